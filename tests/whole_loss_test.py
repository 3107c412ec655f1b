"""What a micro-batch needs of the loss of its batch."""

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import whole_loss
from tests import test_utils


class SurrogateTest(test_utils.TestCase):
    def test_has_the_gradient_of_the_loss(self):
        x = tf.constant(np.linspace(-40, 40, 12, dtype="float32")[:, None])
        y = tf.cast(x < 5, tf.float32)
        loss = keras.losses.BinaryCrossentropy()

        @tf.function
        def gradients(start, stop):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y_pred = {"a": keras.activations.sigmoid(x), "b": 2.0 * x}
                value = loss(y, y_pred["a"]) + tf.reduce_sum(y_pred["b"] ** 3)
            expected = tape.gradient(value, x)
            y_pred = {"a": keras.activations.sigmoid(x), "b": 2.0 * x}
            leaves = [*map(tf.identity, whole_loss.differentiable(y_pred))]
            a, b, logits = leaves
            compat.set_cached_logits(a, logits)
            with tf.GradientTape() as tape:
                tape.watch(leaves)
                value = loss(y, a) + tf.reduce_sum(b**3)
            by_outputs = tape.gradient(
                value,
                leaves,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            with tf.GradientTape() as tape:
                part = x[start:stop]
                tape.watch(part)
                y_pred = {"a": keras.activations.sigmoid(part), "b": 2.0 * part}
                whole = whole_loss.WholeLoss(
                    value,
                    [],
                    tf.constant(12),
                    [each[start:stop] for each in by_outputs],
                )
                surrogate = whole_loss.surrogate(whole, y_pred)
            return expected[start:stop], tape.gradient(surrogate, part)

        # Where a sigmoid is 0 or 1 in rounding, by way of the logits.
        expected, actual = gradients(tf.constant(3), tf.constant(12))
        self.assertAllClose(actual, expected)


if __name__ == "__main__":
    tf.test.main()
