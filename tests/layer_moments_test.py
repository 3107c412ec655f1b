"""The moments of one micro-batch."""

import keras
import tensorflow as tf

from keras_accum import layer_moments
from tests import test_utils


class MomentsTest(test_utils.TestCase):
    def test_counts_the_values_of_a_channel(self):
        layer = keras.layers.BatchNormalization()
        layer.build((None, 5, 3))
        inputs, means = tf.zeros([2, 5, 3]), tf.zeros([3])
        mask = tf.sequence_mask([5, 2], 5)
        for given, count in ((None, 10), (mask, 7)):
            moments = layer_moments.moments_of(
                layer, inputs, given, means, means
            )
            self.assertAllEqual(moments.count, float(count))
            self.assertIs(moments.layer, layer)

    def test_one_channel_keeps_its_axis(self):
        layer = keras.layers.BatchNormalization()
        layer.build((None, 5, 1))
        mask = tf.sequence_mask([5, 2], 5)
        zero = tf.zeros([])
        moments = layer_moments.moments_of(
            layer, tf.zeros([2, 5, 1]), mask, zero, zero
        )
        self.assertEqual(moments.means.shape, (1,))


if __name__ == "__main__":
    tf.test.main()
