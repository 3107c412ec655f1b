"""How added losses and regularizers count where the loss is a sum."""

import keras
import tensorflow as tf

from keras_accum import added_losses
from keras_accum import microbatch
from tests import test_utils


class CountedTest(test_utils.TestCase):
    def model(self):
        x = keras.Input((2,))
        layer = keras.layers.Dense(2, kernel_regularizer="l2")
        return keras.Model(x, layer(x))

    def test_regularizers_count_once_a_window(self):
        model, losses = self.model(), [tf.constant(3.0), tf.constant(5.0)]
        self.assertEqual(added_losses.number_of_regularizers(model), 1)
        for is_first, expected in ((True, [3, 5]), (False, [3])):
            each = microbatch.Microbatch(model, is_first)
            counted = added_losses.counted(model, losses, each)
            self.assertAllEqual(counted, expected)
        for is_first, expected in ((True, [3, 5]), (False, [3, 0])):
            known_late = microbatch.Microbatch(
                model, lambda is_first=is_first: tf.constant(is_first)
            )
            counted = added_losses.counted(model, losses, known_late)
            self.assertAllEqual(counted, expected)

    def test_means_count_by_their_share(self):
        model, losses = self.model(), [tf.constant(3.0), tf.constant(5.0)]
        each = microbatch.Microbatch(model, True)
        each.row_share = tf.constant(0.5)
        counted = added_losses.counted(model, losses, each)
        self.assertAllEqual(counted, [1.5, 5.0])

    def test_replicas_without_rows_regularize_as_well(self):
        model = self.model()
        model.compile("sgd", "mse")
        model.set_weights([tf.ones((2, 2)), tf.zeros(2)])
        each = microbatch.Microbatch(model, True, has_rows=tf.constant(False))
        added_losses.regularize_without_rows(model, each)
        self.assertAllClose(each.loss_without_rows, 0.04)
        kernel, bias = each.gradients_without_rows.values()
        self.assertAllClose(kernel, 0.02 * tf.ones((2, 2)))
        self.assertIsNone(bias)
        later = microbatch.Microbatch(model, False, has_rows=tf.constant(False))
        added_losses.regularize_without_rows(model, later)
        self.assertEmpty(later.gradients_without_rows)


if __name__ == "__main__":
    tf.test.main()
