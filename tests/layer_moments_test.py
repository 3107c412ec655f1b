"""The moments of a micro-batch."""

import keras
import tensorflow as tf

from keras_accum import layer_moments


class MomentsTest(tf.test.TestCase):
    def test_count_entries_of_a_channel(self):
        layer = keras.layers.BatchNormalization()
        layer.build((None, 4, 3))
        inputs, moments = tf.zeros((2, 4, 3)), [tf.zeros((1, 1, 3))] * 2
        found = layer_moments.moments_of(layer, inputs, None, *moments)
        self.assertAllEqual(found.count, 8)
        self.assertEqual(found.means.shape, (3,))
        mask = tf.constant([[True, False, False, True], [True] * 4])
        found = layer_moments.moments_of(layer, inputs, mask, *moments)
        self.assertAllEqual(found.count, 6)


if __name__ == "__main__":
    tf.test.main()
