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

    def test_common_count(self):
        self.assertIsNone(rows.common_count((tf.constant(1.0), None)))
        for sizes, expected in (((3, 3), 3), ((3, 2), -1)):
            data = [tf.zeros((size, 2)) for size in sizes]
            self.assertAllEqual(rows.common_count((data, None)), expected)

    def test_spread(self):
        dense = np.arange(20).reshape(10, 2)
        ragged = tf.ragged.constant([[i] * (i % 3) for i in range(10)])
        some, lists, nothing = rows.spread(
            (tf.constant(dense), ragged, None), 4
        )
        self.assertAllEqual(some[:, 0], [0, 6, 12, 18])
        self.assertAllEqual(lists, [[], [], [], []])
        self.assertIsNone(nothing)
        sparse = tf.sparse.from_dense(dense)
        some, first = rows.spread((tf.constant(dense), sparse), 4)
        self.assertAllEqual(some, dense[:4])
        self.assertAllEqual(tf.sparse.to_dense(first), dense[:4])
        whole = tf.constant(dense)
        self.assertIs(rows.spread(whole, 10), whole)

    def test_scalars(self):
        with self.assertRaisesRegex(ValueError, "cut along the first axis"):
            rows.check_count([tf.zeros((3, 2)), tf.zeros(())])


if __name__ == "__main__":
    tf.test.main()
