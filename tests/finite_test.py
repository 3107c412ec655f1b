"""Whether there is a NaN or an infinity in gradients."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import finite
from tests import test_utils


class AllFiniteTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        dtype=("float64", "float32", "bfloat16", "float16"),
        shape=((), (5,), (7, 5), (3, 4, 5)),
        jit_compile=(True, False),
    )
    def test_of_any_shape(self, dtype, shape, jit_compile):
        found = tf.function(
            lambda *values: finite.all_finite(values), jit_compile=jit_compile
        )
        # The largest there is, everywhere.
        largest = np.full(shape, tf.as_dtype(dtype).max)
        self.assertTrue(bool(found(tf.constant(largest, dtype), tf.ones(2))))
        for value in (np.nan, np.inf, -np.inf):
            bad = np.ones(shape)
            bad[(-1,) * len(shape)] = value
            bad = tf.constant(bad, dtype)
            self.assertFalse(bool(found(tf.ones(2), bad)))

    def test_of_rows_and_of_nothing(self):
        rows = tf.IndexedSlices(tf.constant([[1.0, np.nan]]), [3], [9, 2])
        self.assertFalse(bool(finite.all_finite([None, rows])))
        self.assertTrue(bool(finite.all_finite([None])))
        self.assertTrue(bool(finite.all_finite([])))


class FactorsTest(test_utils.TestCase, parameterized.TestCase):
    """Gradients that are much larger than what they are products of."""

    @parameterized.product(
        factors_and_finite=(
            ((1.0, 1.0), True),
            ((np.nan, 1.0), False),
            ((1.0, -np.inf), False),
            # Each is finite, and their product is not.
            ((1e25, 1e25), False),
            ((1e20, -1e20), False),
            # Larger than what is finite for certain.
            ((5e18, 4e18), True),
            # The squares are not finite.
            ((1e30, 1e-10), True),
        ),
        jit_compile=(True, False),
    )
    def test_all_finite(self, factors_and_finite, jit_compile):
        (in_x, in_dy), expected = factors_and_finite
        x, dy = np.zeros((2, 2, 64), "float32")
        x[1, 5], dy[1, 7] = in_x, in_dy

        @tf.function(jit_compile=jit_compile)
        def found(x, dy):
            gradient = tf.matmul(x, dy, transpose_a=True)
            self.assertIsNotNone(finite.small_factors(gradient))
            return finite.all_finite([gradient], looks_at_factors=True)

        self.assertEqual(bool(found(x, dy)), expected)

    def test_only_where_they_are_small(self):
        def assert_not_small(x, dy):
            gradient = tf.matmul(x, dy, transpose_a=True)
            self.assertIsNone(finite.small_factors(gradient))
            self.assertIsNone(finite.small_factors(2 * gradient))

        for shape in (2, 8), (32, 64), (None, 64):
            spec = tf.TensorSpec(shape)
            tf.function(assert_not_small).get_concrete_function(spec, spec)


if __name__ == "__main__":
    tf.test.main()
