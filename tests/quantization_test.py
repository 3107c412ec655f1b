"""Quantized models, and those with low-rank adapters, train as in Keras."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}


def quantized(cls, quantization, has_lora=False, **kwargs):
    """Returns `mlp` with quantized layers, and with adapters or without."""
    model = test_utils.mlp(cls, **kwargs)
    for layer in model.layers[1:]:
        if quantization:
            layer.quantize(quantization)
        if has_lora:
            keras.utils.set_random_seed(3)
            layer.enable_lora(2)
    return model


class QuantizationTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("int8", "graph"), ("int4", "xla"), (None, "eager")
    )
    @test_utils.first_command(0, 2)
    def test_trains_as_the_large_batch(self, quantization, mode):
        self.check(quantization, mode)

    @parameterized.parameters(
        ("int8", "xla"),
        ("int8", "eager"),
        ("int4", "graph"),
        ("int4", "eager"),
        (None, "graph"),
        (None, "xla"),
    )
    @test_utils.first_command(second=(0,))
    def test_trains_as_the_large_batch_elsewhere(self, quantization, mode):
        self.check(quantization, mode)

    def check(self, quantization, mode):
        self.assertTrainsAlike(
            functools.partial(
                quantized, quantization=quantization, has_lora=True
            ),
            lambda: {
                "optimizer": keras.optimizers.SGD(0.1),
                "loss": test_utils.crossentropy(),
                **MODES[mode],
            },
            [
                test_utils.microbatches(sizes, seed)
                for seed, sizes in enumerate([(8, 7, 5), (3, 9), (4, 4, 4)])
            ],
        )

    # In eager mode Keras raises.
    @parameterized.parameters("graph", "xla")
    @test_utils.first_command(0)
    def test_float8(self, mode):
        # Gradients of a mean over half as many rows are twice as large, and so
        # rounded alike.
        expected = quantized(keras.Model, "float8")
        if self.microbatch_size:
            kwargs = {"microbatch_size": 4}
        else:
            kwargs = {"accum_steps": 2}
        actual = quantized(
            keras_accum.GradientAccumulationModel, "float8", **kwargs
        )
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(
                keras.optimizers.SGD(0.1),
                loss=test_utils.crossentropy(),
                **MODES[mode],
            )
        for seed in range(3):
            window = test_utils.microbatches([4, 4], seed)
            whole = [test_utils.concatenate(window)]
            test_utils.train_on(expected, whole)
            test_utils.train_on(
                actual, whole if self.microbatch_size else window
            )
        self.assertNotAllClose(initial[0], actual.get_weights()[0])
        for mine, theirs in zip(actual.weights, expected.weights, strict=True):
            factor, tolerance = 1.0, 1e-5
            if mine.path.endswith("bias"):
                # Keras sums its gradient over the rows in 8 bits.
                tolerance = 2.0**-8
            elif "outputs_grad" in mine.path:
                factor, tolerance = 2.0, 1e-3
            self.assertAllClose(
                mine.numpy(),
                factor * theirs.numpy(),
                rtol=tolerance,
                atol=tolerance * np.abs(theirs.numpy()).max(),
                msg=mine.path,
            )

    @pytest.mark.thorough
    def test_scales_on_several_replicas(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        build = functools.partial(quantized, quantization="float8")
        rows = 4 * strategy.num_replicas_in_sync
        batches = test_utils.microbatches([rows] * 4)
        # The largest input is on the last replica, and not in the last batch.
        batches[0][0][-1] *= 50
        with strategy.scope():
            replicated = test_utils.accumulating(build, accum_steps=2)
            replicated.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
        single = test_utils.accumulating(build, accum_steps=2)
        initial = single.get_weights()
        single.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        for model in (replicated, single):
            model.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameTraining(replicated, single, initial, tolerance=0.1)
        for mine, theirs in zip(
            replicated.weights, single.weights, strict=True
        ):
            if "inputs_amax" in mine.path or "kernel_amax" in mine.path:
                self.assertAllClose(mine, theirs, rtol=0.05)
                self.assertGreater(np.max(theirs.numpy()), 0)


@pytest.mark.thorough
class PlainMicrobatchTest(QuantizationTest):
    microbatch_size = 3


if __name__ == "__main__":
    tf.test.main()
