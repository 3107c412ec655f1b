"""Some rows of a batch, and others like them."""

import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import sample
from tests import test_utils


class SampleTest(test_utils.TestCase):
    def make(self, rows=3):
        y_pred = tf.nn.softmax(tf.random.stateless_normal([rows, 4], [1, 2]))
        compat.set_keras_mask(y_pred, tf.range(rows) > 0)
        x = tf.sparse.from_dense(np.eye(rows))
        return sample.Sample(x, {"y": tf.range(1, 1 + rows)}, {"p": y_pred})

    def test_parts_have_their_masks(self):
        part = self.make().part(1, 3)
        self.assertEqual(part.rows, 2)
        self.assertAllEqual(part.y["y"], [2, 3])
        self.assertAllEqual(compat.keras_mask(part.y_pred["p"]), [True, True])
        self.assertIsNone(part.sample_weight)

    def test_other_outputs_are_in_the_same_range(self):
        before = self.make()
        others = before.with_other_outputs().y_pred["p"]
        self.assertAllClose(tf.reduce_sum(others, axis=-1), tf.ones(3))
        self.assertNotAllClose(others, before.y_pred["p"])
        mask = compat.keras_mask(others)
        self.assertAllEqual(mask, [False, True, True])
        logits = tf.constant([[-3.0, 0.5], [2.0, 0.0]])
        varied = sample.varied(logits, np.random.default_rng(0))
        self.assertAllEqual(tf.sign(varied), tf.sign(logits))

    def test_twice(self):
        twice = self.make(1).twice()
        self.assertEqual(twice.rows, 2)
        self.assertEqual(twice.x.shape[0], 2)
        first, second = twice.y_pred["p"]
        self.assertNotAllClose(first, second)
        mask = compat.keras_mask(twice.y_pred["p"])
        self.assertAllEqual(mask, [False, False])

    def test_half_zero(self):
        y = sample.half_zero({"a": tf.ones((1, 5)), "b": tf.constant([2])})
        self.assertAllEqual(y["a"], [[1, 1, 1, 0, 0]])
        self.assertAllEqual(y["b"], [2])


if __name__ == "__main__":
    tf.test.main()
