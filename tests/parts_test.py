"""Losses with denominators of their own, where the batch is not known."""

import os
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import parts
from keras_accum import weighting
from tests import test_utils

SIZES = [4, 2, 6, 4]


class Adds(keras.layers.Layer):
    """Adds a loss that is a sum over the rows, or a value for each."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, inputs):
        square = 0.1 * keras.ops.square(inputs)
        if self.kind == "sum":
            self.add_loss(keras.ops.sum(square))
        if self.kind == "mean":
            self.add_loss(keras.ops.mean(square))
        return inputs


def tagger(cls=keras.Model, added=(), regularizer=None, **kwargs):
    """A tag for each token, with a mask; and a class for the whole."""
    keras.utils.set_random_seed(7)
    tokens = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    for kind in added:
        pooled = Adds(kind)(pooled)
    outputs = {
        "tags": keras.layers.Dense(
            5, name="tags", kernel_regularizer=regularizer, dtype="float32"
        )(hidden),
        "label": keras.layers.Dense(3, name="label", dtype="float32")(pooled),
    }
    return cls(tokens, outputs, **kwargs)


def batches(sizes=SIZES, seed=0):
    """Micro-batches; the rows have ever fewer tokens."""
    rng = np.random.default_rng(seed)
    rows = sum(sizes)
    tokens = rng.integers(1, 9, (rows, 5))
    lengths = np.linspace(5, 1, rows).astype(int)
    tokens *= np.arange(5) < lengths[:, None]
    labels = {
        "tags": rng.integers(0, 5, (rows, 5)),
        "label": rng.integers(0, 3, (rows,)),
    }
    bounds = np.cumsum([0, *sizes])
    return [
        (tokens[a:b], {name: each[a:b] for name, each in labels.items()})
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def losses(**reductions):
    return {
        name: keras.losses.SparseCategoricalCrossentropy(
            from_logits=True,
            reduction=reductions.get(name, "sum_over_batch_size"),
        )
        for name in ("tags", "label")
    }


class ExactnessTest(test_utils.TestCase, parameterized.TestCase):
    def check(
        self,
        build=tagger,
        reductions=None,
        strategy=None,
        rtol=1e-5,
        jit_compile=False,
        **others,
    ):
        """Trains on two windows, and in plain Keras on two batches."""
        strategy = strategy or tf.distribute.get_strategy()
        data = batches(), batches(seed=1)
        expected = build(keras.Model)
        initial = expected.get_weights()
        with strategy.scope():
            actual = build(
                keras_accum.GradientAccumulationModel, accum_steps=len(SIZES)
            )
        reported = []
        for model in (expected, actual):
            with model.distribute_strategy.scope():
                model.compile(
                    keras.optimizers.SGD(0.2),
                    losses(**reductions or {}),
                    loss_weights={"tags": 1.0, "label": 0.7},
                    jit_compile=jit_compile,
                    **others,
                )
            given = [*data[0], *data[1]]
            if model is expected:
                given = [test_utils.concatenate(each) for each in data]
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "One weight")
                history = model.fit(
                    test_utils.dataset(given), shuffle=False, verbose=0
                )
            reported.append({k: v[0] for k, v in history.history.items()})
            if not model.run_eagerly:
                # Keras counts outputs by rows that are known while tracing.
                reported[-1] = reported[-1]["loss"]
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial, rtol
        )
        if strategy.num_replicas_in_sync == 1:
            self.assertAllClose(reported[1], reported[0], rtol=rtol)
        return actual

    @parameterized.parameters(
        {},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 3},
    )
    @test_utils.first_command(second=(1,))
    def test_masks_that_differ(self, **how):
        self.check(**how)

    @parameterized.parameters(
        {"tags": "sum"}, {"label": "sum"}, {"label": "mean_with_sample_weight"}
    )
    @test_utils.first_command(0, second=(1,))
    def test_reductions_that_differ(self, **reductions):
        self.check(reductions=reductions)

    @parameterized.parameters(
        (["sum"], {}),
        (["mean"], {}),
        (["sum", "mean"], {}),
        (["mean"], {"tags": "sum", "label": "sum"}),
    )
    @test_utils.first_command(second=(2,))
    def test_added_losses(self, added, reductions):
        def build(cls, **kwargs):
            return tagger(cls, added, "l2", **kwargs)

        self.check(build, reductions)

    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_added_losses_alone(self, run_eagerly):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(3)
            x = keras.Input((5,), dtype="int32")
            hidden = keras.layers.Embedding(9, 4)(x)
            hidden = Adds("sum")(Adds("mean")(hidden))
            return cls(x, hidden, **kwargs)

        expected = build(keras.Model)
        actual = build(keras_accum.GradientAccumulationModel, accum_steps=4)
        initial, reported = expected.get_weights(), []
        for model, size in ((expected, 16), (actual, 4)):
            model.compile(keras.optimizers.SGD(0.2), run_eagerly=run_eagerly)
            x = np.concatenate([x for x, _ in batches()])
            history = model.fit(x, batch_size=size, shuffle=False, verbose=0)
            reported.append(history.history["loss"])
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )
        self.assertAllClose(*reported)

    @parameterized.parameters(False, True)
    @test_utils.first_command(second=(0,))
    def test_on_replicas(self, jit_compile):
        self.check(
            strategy=test_utils.chosen_strategy()[0], jit_compile=jit_compile
        )

    @pytest.mark.thorough
    def test_added_sums_on_replicas(self):
        def build(cls, **kwargs):
            return tagger(cls, ["sum"], **kwargs)

        self.check(build, strategy=test_utils.chosen_strategy()[0])

    @pytest.mark.thorough
    def test_in_mixed_precision(self):
        self.addCleanup(
            keras.config.set_dtype_policy, keras.config.dtype_policy()
        )
        keras.config.set_dtype_policy("mixed_float16")
        self.check(rtol=1e-2)

    @pytest.mark.thorough
    def test_goes_on_in_the_middle_of_a_window(self):
        found = []
        for stops in (False, True):
            model = tagger(keras_accum.GradientAccumulationModel, accum_steps=4)
            model.compile("sgd", losses(), run_eagerly=True)
            for index, (x, y) in enumerate(batches()):
                if stops and index == 2:
                    file = os.path.join(self.get_temp_dir(), "it.weights.h5")
                    model.save_weights(file)
                    model = tagger(
                        keras_accum.GradientAccumulationModel, accum_steps=4
                    )
                    model.compile("sgd", losses(), run_eagerly=True)
                    model.load_weights(file)
                logs = model.train_on_batch(x, y, return_dict=True)
            found.append((model.get_weights(), logs["loss"]))
        self.assertAllClose(found[1][0], found[0][0], 0, 0)
        self.assertAllClose(found[1][1], found[0][1])

    def test_a_window_with_a_nan(self):
        model = tagger(
            keras_accum.GradientAccumulationModel,
            accum_steps=4,
            nonfinite="skip_microbatch",
        )
        other = tagger(keras_accum.GradientAccumulationModel, accum_steps=3)
        data = batches()
        for each in (model, other):
            each.compile(
                keras.optimizers.SGD(0.2),
                losses(),
                run_eagerly=True,
            )
        weight = {"tags": np.ones((4, 1)), "label": np.full(4, np.nan)}
        data[3] = (*data[3], weight)
        for each in data:
            model.train_on_batch(*each)
        for each in data[:3]:
            other.train_on_batch(*each)
        self.assertAllClose(model.get_weights(), other.get_weights(), 0, 1e-7)


class PartsTest(test_utils.TestCase):
    def test_groups_are_by_source(self):
        rows, other = weighting.of_rows(3), weighting.Denominator(2.0, ("m",))
        found = parts.grouped([None, other, rows, None, other])
        self.assertEqual(list(found.values()), [[1, 4], [2], [0, 3]])

    def test_takes_a_loss_apart(self):
        x, y = tf.Variable(2.0), tf.Variable([1.0, 3.0])
        with tf.GradientTape(persistent=True) as tape:
            terms = parts.Terms(tape)
            for loss in (x * x, 3 * x):
                terms.record_compiled(loss)
            values = terms.record_added([y * y, x + 1.0])
            loss = 2 * terms.compiled[0] + terms.compiled[1]
            loss += tf.reduce_sum(values[0]) + values[1]
            scaled = 8 * loss
        rows = weighting.of_rows(5)
        means, sums = parts.apart(terms, loss, scaled, [rows, None, None], 1)
        self.assertAllClose([means.loss, means.weight], [8 + 3, 5])
        self.assertAllClose([sums.loss], [6 + 10])
        self.assertIsNone(sums.weight)
        self.assertAllClose(means.gradients(tape, [x]), [8 * (8 + 1)])
        self.assertAllClose(sums.gradients(tape, [y]), [[16.0, 48.0]])


if __name__ == "__main__":
    tf.test.main()
