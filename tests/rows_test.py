"""The rows of a batch."""

import numpy as np
import tensorflow as tf

from keras_accum import rows


class CountTest(tf.test.TestCase):
    def test_lengths_that_are_known_later(self):
        @tf.function(
            input_signature=[tf.TensorSpec((None, 2)), tf.TensorSpec((None,))]
        )
        def count(x, y):
            return rows.check_count((x, y))

        self.assertEqual(int(count(np.zeros((3, 2)), np.zeros(3))), 3)
        with self.assertRaisesRegex(
            tf.errors.InvalidArgumentError, "cut along the first axis"
        ):
            count(np.zeros((3, 2)), np.zeros(4))

    def test_scalars(self):
        with self.assertRaisesRegex(ValueError, "cut along the first axis"):
            rows.check_count([tf.zeros((3, 2)), tf.zeros(())])


if __name__ == "__main__":
    tf.test.main()
