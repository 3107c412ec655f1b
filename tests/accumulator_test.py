"""The buffers, against sums by hand."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils


def variables(*shapes, dtype="float32"):
    return [tf.Variable(tf.zeros(shape, dtype)) for shape in shapes]


class EquivalenceTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_mean_is_the_weighted_mean(self, jit_compile):
        rng = np.random.default_rng(0)
        gradients = rng.normal(size=(4, 2, 3)).astype("float32")
        weights = np.array([8.0, 7.0, 5.0, 0.5], "float32")
        accumulator = keras_accum.GradientAccumulator(variables((2, 3)))
        add = tf.function(accumulator.add, jit_compile=jit_compile)
        for gradient, weight in zip(gradients, weights, strict=True):
            add([tf.constant(gradient)], tf.constant(weight))
        expected = np.average(gradients.astype("float64"), 0, weights)
        self.assertAllClose(accumulator.mean()[0], expected, rtol=1e-6)
        self.assertEqual(accumulator.weight, 20.5)
        self.assertEqual(accumulator.count, 4)

    def test_no_weight_adds_up(self):
        accumulator = keras_accum.GradientAccumulator(variables(()))
        for gradient in (1.0, 2.0, 4.0):
            accumulator.add([tf.constant(gradient)], weight=None)
        self.assertAllEqual(accumulator.mean()[0], 7.0)

    def test_reset_forgets_even_nan(self):
        accumulator = keras_accum.GradientAccumulator(variables(()))
        accumulator.add([tf.constant(np.nan)])
        accumulator.reset()
        accumulator.add([tf.constant(3.0)])
        self.assertAllEqual(accumulator.mean()[0], 3.0)

    @parameterized.parameters(False, True)
    def test_first_forgets_even_nan(self, as_tensor):
        first = tf.constant(True) if as_tensor else True
        accumulator = keras_accum.GradientAccumulator(variables((), (2,)))
        accumulator.add([tf.constant(np.nan), tf.constant([np.nan, 1.0])])
        accumulator.forget()
        accumulator.add([tf.constant(3.0), None], weight=2.0, first=first)
        self.assertAllEqual(accumulator.mean()[0], 3.0)
        self.assertAllEqual(accumulator.mean()[1], [0.0, 0.0])
        self.assertEqual(accumulator.weight, 2.0)
        self.assertEqual(accumulator.count, 1)

    def test_first_as_a_tensor_may_be_false(self):
        accumulator = keras_accum.GradientAccumulator(variables(()))
        for first, gradient in ((True, 3.0), (False, 5.0)):
            accumulator.add([tf.constant(gradient)], first=tf.constant(first))
        self.assertAllEqual(accumulator.mean()[0], 4.0)

    def test_zero_weight_gives_zeros(self):
        accumulator = keras_accum.GradientAccumulator(variables((2,)))
        accumulator.add([tf.constant([1.0, 2.0])], weight=0.0)
        self.assertAllEqual(accumulator.mean()[0], [0.0, 0.0])

    def test_empty_gives_none(self):
        accumulator = keras_accum.GradientAccumulator(variables((2,)))
        self.assertEqual(accumulator.mean(), [None])

    def test_missing_gradients_lose_nothing(self):
        accumulator = keras_accum.GradientAccumulator(variables((), (), ()))
        one = tf.constant(1.0)
        accumulator.add([one, None, None], weight=3.0)
        accumulator.add([None, one, None], weight=1.0)
        self.assertAllEqual(accumulator.mean()[:2], [0.75, 0.25])
        self.assertIsNone(accumulator.mean()[2])
        self.assertIsNone(accumulator.buffers[2])


class SparseTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        jit_compile=(False, True), first=(False, True, "tensor")
    )
    def test_rows_equal_the_dense_sum(self, jit_compile, first):
        accumulator = keras_accum.GradientAccumulator(variables((4, 2)))
        accumulator.add([tf.fill((4, 2), 9.0)])
        accumulator.forget() if first else accumulator.reset()
        first = tf.constant(True) if first == "tensor" else first
        rows = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

        @tf.function(jit_compile=jit_compile)
        def add(first):
            # Row 2 comes twice.
            slices = tf.IndexedSlices(rows, tf.constant([2, 0, 2]), (4, 2))
            accumulator.add([slices], weight=2.0, first=first)

        add(first)
        add(False)
        self.assertAllClose(
            accumulator.mean()[0], [[3, 4], [0, 0], [6, 8], [0, 0]]
        )

    def test_no_tensor_of_the_tables_size_is_made(self):
        table = variables((1000, 8))
        accumulator = keras_accum.GradientAccumulator(table)
        # The buffer is there before the step is traced.
        accumulator.add([tf.zeros((1000, 8))])

        @tf.function
        def add(values):
            slices = tf.IndexedSlices(values, tf.constant([3]), (1000, 8))
            accumulator.add([slices])

        graph = add.get_concrete_function(tf.TensorSpec((1, 8))).graph
        made = [
            output.shape.num_elements()
            for op in graph.get_operations()
            for output in op.outputs
            if op.type != "Placeholder" and output.dtype == tf.float32
        ]
        self.assertLessEqual(max(n or 0 for n in made), 8)
        self.assertIn(
            "ResourceScatterAdd", [op.type for op in graph.get_operations()]
        )


class DtypeTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("bfloat16", None, tf.float32),
        ("float16", None, tf.float32),
        ("float32", None, tf.float32),
        ("float64", None, tf.float64),
        ("float32", "float64", tf.float64),
        ("float32", "bfloat16", tf.bfloat16),
    )
    def test_buffers(self, variable, requested, expected):
        accumulator = keras_accum.GradientAccumulator(
            variables((2,), dtype=variable), dtype=requested
        )
        accumulator.add([tf.ones((2,), variable)])
        self.assertEqual(accumulator.buffers[0].dtype, expected)
        self.assertEqual(accumulator.mean()[0].dtype, variable)

    def test_bfloat16_sums_do_not_stall(self):
        accumulator = keras_accum.GradientAccumulator(
            variables((), dtype="bfloat16")
        )
        for _ in range(1000):
            accumulator.add([tf.ones((), "bfloat16")])
        # In bfloat16 the sum would stop at 256.
        self.assertAllEqual(accumulator.buffers[0], 1000.0)
        self.assertAllEqual(accumulator.mean()[0], 1.0)


class FailureTest(test_utils.TestCase):
    def test_a_failing_step_changes_no_buffer(self):
        accumulator = keras_accum.GradientAccumulator(variables((), (3,)))
        accumulator.add([tf.constant(1.0), tf.ones(3)])

        @tf.function
        def step(indices):
            tf.debugging.assert_less(indices, 3)
            late = tf.gather(tf.ones(3), indices)
            accumulator.add([tf.constant(5.0), late])

        step(tf.constant([0, 1, 2]))
        with self.assertRaises(tf.errors.InvalidArgumentError):
            step(tf.constant([0, 1, 7]))
        self.assertAllEqual(accumulator.buffers[0], 6.0)
        self.assertAllEqual(accumulator.buffers[1], [2.0, 2.0, 2.0])
        self.assertEqual(accumulator.count, 2)
        self.assertEqual(accumulator.weight, 2.0)

    def test_a_check_besides_the_gradients_counts_too(self):
        accumulator = keras_accum.GradientAccumulator(variables(()))

        @tf.function
        def step(fine):
            slow = tf.reduce_sum(
                tf.random.normal((500, 500)) @ tf.ones((500, 500))
            )
            tf.debugging.Assert(tf.logical_and(fine, slow < 1e30), ["no"])
            accumulator.add([tf.constant(1.0)])

        step(tf.constant(True))
        for _ in range(5):
            with self.assertRaises(tf.errors.InvalidArgumentError):
                step(tf.constant(False))
        self.assertEqual(accumulator.count, 1)
        self.assertAllEqual(accumulator.buffers[0], 1.0)


class ErrorTest(test_utils.TestCase):
    def test_lengths(self):
        accumulator = keras_accum.GradientAccumulator(variables((), ()))
        with self.assertRaisesRegex(
            ValueError, "`gradients` must have one entry .* 1 gradients for 2"
        ):
            accumulator.add([tf.constant(1.0)])

    def test_shapes(self):
        accumulator = keras_accum.GradientAccumulator(variables((2,), (2, 3)))
        ones = [tf.ones((2,)), tf.ones((2, 3))]
        accumulator.add(ones)
        rows = tf.IndexedSlices(tf.ones((1, 4)), [0], tf.constant([2, 4]))
        for wrong in ([ones[0], tf.ones((3,))], [ones[0], rows]):
            with self.assertRaisesRegex(
                ValueError, "`gradients` must have the shapes .*wants"
            ):
                accumulator.add(wrong)
        with self.assertRaisesRegex(
            ValueError, r"`weight` must be a scalar. Received: shape=\(2,\)"
        ):
            accumulator.add(ones, weight=tf.constant([1.0, 5.0]))
        # Nothing was added by those.
        self.assertAllEqual(accumulator.buffers[0], [1.0, 1.0])
        self.assertEqual(accumulator.count, 1)

    def test_dtype(self):
        for dtype in ("int32", "flaot32", 7, "bool"):
            with self.assertRaisesRegex(
                ValueError, "`dtype` must be None or the name of a float"
            ):
                keras_accum.GradientAccumulator([], dtype=dtype)


class LoopTest(test_utils.TestCase):
    def test_the_docstrings_loop(self):
        model, reference = test_utils.mlp(), test_utils.mlp()
        batches = test_utils.microbatches([8, 7, 1])
        loss_fn = test_utils.crossentropy()

        def gradients(model, x, y):
            with tf.GradientTape() as tape:
                loss = loss_fn(y, model(x, training=True))
            return tape.gradient(loss, model.trainable_variables)

        accumulator = keras_accum.GradientAccumulator(model.trainable_variables)
        for x, y in batches:
            accumulator.add(gradients(model, x, y), weight=len(x))
        expected = gradients(reference, *test_utils.concatenate(batches))
        for mean, each in zip(accumulator.mean(), expected, strict=True):
            self.assertAllClose(mean, each, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    tf.test.main()
