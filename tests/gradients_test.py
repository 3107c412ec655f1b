"""One gradient: its weight, its buffer, and what is selected in its place."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import counting
from keras_accum import gradients


def rows(values, indices, num_rows=3):
    """Returns a gradient of some rows."""
    values = tf.constant(values)
    return tf.IndexedSlices(
        values, tf.constant(indices), tf.constant([num_rows, values.shape[1]])
    )


class ArithmeticTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(True, False)
    def test_adds_with_a_weight(self, as_tensors):
        variable = tf.Variable(tf.zeros((3, 1)))
        # What it holds before the first is forgotten.
        buffer = tf.Variable(np.full((3, 1), np.nan, "float32"))
        for index, (gradient, weight) in enumerate(
            [
                (tf.constant([[1.0], [2.0], [3.0]]), 2.0),
                (rows([[1.0], [1.0]], [0, 0]), 3.0),
                (None, 5.0),
                (tf.constant([[1.0], [0.0], [0.0]]), None),
            ]
        ):
            first = index == 0
            gradients.add(
                variable,
                buffer,
                gradient,
                weight,
                tf.constant(first) if as_tensors else first,
            )
        self.assertAllEqual(buffer, [[9.0], [4.0], [6.0]])

    def test_without_a_gradient_the_first_clears(self):
        variable, buffer = tf.Variable([1.0]), tf.Variable([np.nan])
        gradients.add(variable, buffer, None, 1.0, True)
        self.assertAllEqual(buffer, [0.0])

    def test_a_nan_is_forgotten_where_the_device_knows(self):
        self.assertAllEqual(gradients.keep_unless(True, [np.nan, 1.0]), [0, 0])

    def test_xla_makes_no_constant_of_all_zeros(self):
        if not counting.counts_tensors("CPU:0"):
            self.skipTest("TensorFlow counts where it uses oneDNN.")
        buffer = tf.Variable(tf.ones((2**20,)))

        @tf.function(jit_compile=True)
        def add(first, gradient):
            kept = gradients.keep_unless(first, buffer)
            (selected,) = gradients.select_all(first, [gradient], [None])
            buffer.assign(kept + selected)

        # The first call compiles.
        size = counting.counted_bytes(add, tf.constant(True), tf.ones((2**20,)))
        self.assertLess(size, 1.5 * 4 * 2**20)
        self.assertAllEqual(buffer, tf.ones((2**20,)))

    def test_programs_keep_no_zeros(self):
        if not counting.counts_tensors("CPU:0"):
            self.skipTest("TensorFlow counts where it uses oneDNN.")
        size = 4 * 2**20
        table = tf.Variable(tf.zeros((2**17, 8)))
        some = rows(np.ones((1, 8), "float32"), [5], num_rows=2**17)

        def add(first):
            gradients.add(table, table, some, 1.0, first)
            (chosen,) = gradients.choose_all(first, [table], [None])
            table.assign_add(chosen)

        before = counting.live_bytes("CPU:0")
        # Two programs, which stay alive.
        programs = [tf.function(add), tf.function(add)]
        for program in programs:
            program(tf.constant(True))
            program(tf.constant(False))
        self.assertLess(counting.live_bytes("CPU:0") - before, size / 2)
        self.assertEqual(tf.reduce_sum(table), 3 * 8)

    def test_buffers_are_wide_enough(self):
        for dtype, requested, expected in (
            ("float16", None, tf.float32),
            ("bfloat16", None, tf.float32),
            ("float64", None, tf.float64),
            ("float32", "bfloat16", tf.bfloat16),
        ):
            found = gradients.buffer_dtype(dtype, requested)
            self.assertEqual(found, expected)


class SelectionTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        function=(gradients.select_all, gradients.choose_all),
        condition=(True, False),
    )
    def test_takes_one_or_the_other(self, function, condition):
        some = [tf.constant([np.nan, 1.0]), None, rows([[2.0]], [1])]
        others = [tf.constant([3.0, 4.0]), None, None]
        dense, missing, sparse = function(tf.constant(condition), some, others)
        self.assertAllEqual(dense, some[0] if condition else others[0])
        self.assertIsNone(missing)
        self.assertAllEqual(sparse.values, [[2.0 if condition else 0.0]])
        self.assertAllEqual(sparse.indices, [1])

    def test_nothing_to_choose(self):
        condition = tf.constant(True)
        self.assertEqual(
            gradients.choose_all(condition, [None], [None]), [None]
        )


if __name__ == "__main__":
    tf.test.main()
