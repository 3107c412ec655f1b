"""What replicas add up, bucket by bucket, and what they send for it."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import reduction
from tests import replicas_test
from tests import test_utils

# The kernels of `mlp` have 6 x 8 and 8 x 3 entries, the biases 8 and 3.
SIZES = (48, 8, 24, 3)
# Of bytes: the first kernel, and then two buckets.
SMALL = 4 * (8 + 24)


def in_small_buckets():
    return mock.patch.object(reduction, "BUCKET_BYTES", SMALL)


class BucketsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (SIZES, "float32", [[48], [8, 24], [3]]),
        # Sent as float32.
        (SIZES, "bfloat16", [[48], [8, 24], [3]]),
        (SIZES, "float64", [[48], [8], [24], [3]]),
        ((33, 33), "float32", [[33], [33]]),
        ((), "float32", [[]]),
    )
    def test_are_in_order_and_of_bounded_size(self, sizes, dtype, expected):
        with in_small_buckets():
            found = reduction.buckets([tf.zeros((n,), dtype) for n in sizes])
        self.assertEqual(
            [[v.shape[0] for v in each] for each in found], expected
        )

    def test_what_is_packed_is_unpacked(self):
        for values in ([tf.ones((2, 3)), tf.zeros((), tf.float64)], [[7.0]]):
            values = tf.nest.map_structure(tf.convert_to_tensor, values)
            found = reduction.unpack(reduction.pack(values), values)
            tf.nest.map_structure(self.assertAllEqual, found, values)


# What was trained to, by the arguments, in buckets of the usual size.
_weights = {}


class TrainsTestCase(replicas_test.TestCase):
    def trained_to(self, *args, **options):
        """Returns the weights that `train` comes to; trains once."""
        key = args, tuple(options.items())
        if key not in _weights:
            _weights[key] = self.train(*args, **options).get_weights()
        return _weights[key]

    def train(self, dtype=None, mode="graph", build=test_utils.mlp, **options):
        """Returns a model that has made two updates."""
        model = self.on_replicas(
            build,
            replicas_test.compile_args("sgd", **replicas_test.MODES[mode]),
            accum_steps=3,
            communication_dtype=dtype,
            **options,
        )
        batches = test_utils.microbatches([8, 7, 5] * 2)
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameOnAllReplicas(model)
        return model


class InBucketsTest(TrainsTestCase):
    """Many buckets give the bits of one."""

    @parameterized.product(
        mode=("graph", "xla", "eager"), dtype=(None, "bfloat16")
    )
    @test_utils.first_command(0, second=(3,))
    def test_fit(self, mode, dtype):
        one = self.trained_to(dtype, mode)
        with in_small_buckets():
            many = self.train(dtype, mode)
        self.assertAllClose(one, many.get_weights(), 0, 0)

    @parameterized.parameters("skip_microbatch", "skip_window")
    @test_utils.first_command(second=(1,))
    def test_nonfinite(self, policy):
        one = self.train(nonfinite=policy)
        with in_small_buckets():
            many = self.train(nonfinite=policy)
        self.assertAllClose(one.get_weights(), many.get_weights(), 0, 0)

    @parameterized.parameters(None, "bfloat16")
    @test_utils.first_command(1)
    def test_by_hand(self, dtype):
        def update(model):
            self.strategy.run(model.train_step, args=(batch,))
            self.strategy.run(model.update_step)

        batch = test_utils.microbatches([4])[0]
        models = []
        for context in (mock.MagicMock(), in_small_buckets()):
            model = self.on_replicas(
                test_utils.mlp,
                replicas_test.compile_args("sgd"),
                accum_steps=3,
                communication_dtype=dtype,
            )
            with context:
                update(model)
            models.append(model.get_weights())
        self.assertAllClose(*models, 0, 0)
        self.assertNotAllClose(models[0], test_utils.mlp().get_weights())

    def test_a_mean_by_hand_leaves_the_buffers(self):
        with self.strategy.scope():
            variables = [tf.Variable(tf.zeros((n,))) for n in SIZES]
        accumulator = keras_accum.GradientAccumulator(variables)

        def mean():
            return accumulator.mean()

        gradients = [np.full((n,), n, "float32") for n in SIZES]
        self.strategy.run(accumulator.add, args=(gradients,))
        with in_small_buckets():
            for _ in range(2):
                for n, each in zip(SIZES, self.strategy.run(mean), strict=True):
                    local = self.strategy.experimental_local_results(each)
                    for value in local:
                        self.assertAllEqual(value, np.full((n,), n, "float32"))


class SentTest(replicas_test.ProgramTestCase):
    """What is sent at the boundary, in the traced program."""

    def sent(self, **kwargs):
        """Returns the entries of each collective on the first replica."""
        _, program = self.program(**kwargs)
        nodes = program.reductions(program.top)
        entries = []
        for node in nodes:
            (shape,) = node.attr["_output_shapes"].list.shape
            entries.append(int(np.prod([dim.size for dim in shape.dim])))
        return entries[:: self.replicas]

    def test_small_buckets_send_as_much(self):
        (whole,) = self.sent(jit_compile=False)
        with in_small_buckets():
            found = self.sent(jit_compile=False)
        self.assertLen(found, 3)
        self.assertEqual(sum(found), whole)


class RoundedTest(TrainsTestCase):
    @parameterized.parameters("graph", "xla")
    @test_utils.first_command(0, second=())
    def test_weights_are_close(self, mode):
        exact, rounded, initial = (
            np.concatenate([each.ravel() for each in weights])
            for weights in (
                self.trained_to(None, mode),
                self.trained_to("bfloat16", mode),
                test_utils.mlp().get_weights(),
            )
        )
        off = np.linalg.norm(exact - rounded)
        if self.replicas == 1:
            self.assertEqual(off, 0)
            return
        self.assertGreater(off, 0)
        # Rounding to 8 bits is off by 2**-8 of the least number of a binade at
        # most; in the mean of squares by that over sqrt(3), and of numbers that
        # are 1.5 times as large: 1.5e-3 of the gradients. What is added up of
        # them is off by as much of how far the weights moved.
        self.assertLess(off / np.linalg.norm(exact - initial), 2e-3)

    @pytest.mark.thorough
    def test_losses_and_metrics_are_not_rounded(self):
        logs = []
        for dtype in (None, "bfloat16"):
            model = self.on_replicas(
                test_utils.mlp,
                replicas_test.compile_args("sgd", metrics=["accuracy"]),
                accum_steps=3,
                communication_dtype=dtype,
            )
            batches = test_utils.microbatches([8, 7, 5])
            history = model.fit(test_utils.dataset(batches), verbose=0).history
            logs.append(history)
        self.assertEqual(*logs)

    @pytest.mark.thorough
    def test_may_be_changed(self):
        model, batches = self.train(), test_utils.microbatches([8, 7, 5])
        for dtype in ("bfloat16", None):
            model.communication_dtype = dtype
            model.set_weights(test_utils.mlp().get_weights())
            fresh = self.on_replicas(
                test_utils.mlp,
                replicas_test.compile_args("sgd"),
                accum_steps=3,
                communication_dtype=dtype,
            )
            for each in (model, fresh):
                each.fit(test_utils.dataset(batches), verbose=0)
            self.assertAllClose(model.get_weights(), fresh.get_weights(), 0, 0)

    def test_is_saved(self):
        model = test_utils.accumulating(communication_dtype="bfloat16")
        loaded = type(model).from_config(model.get_config())
        self.assertEqual(loaded.communication_dtype, "bfloat16")

    @pytest.mark.thorough
    def test_float64(self):
        def build(cls, **kwargs):
            return test_utils.mlp(cls, dtype="float64", **kwargs)

        exact, rounded = (
            self.train(build=build),
            self.train("bfloat16", build=build),
        )
        self.assertAllClose(
            exact.get_weights(), rounded.get_weights(), rtol=0, atol=2e-3
        )


if __name__ == "__main__":
    tf.test.main()
