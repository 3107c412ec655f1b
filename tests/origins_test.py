"""What gradients are of."""

import tensorflow as tf

from keras_accum import compat
from keras_accum import origins
from tests import test_utils


class OriginsTest(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        self.origins = origins.Origins()
        self.variables = test_utils.mlp().trainable_weights

    def gradients(self, sources, is_vector=False):
        with compat.recording_gradients(self.origins.record):
            with tf.GradientTape() as tape:
                losses = [tf.reduce_sum(v) for v in self.variables[:3]]
                loss = tf.stack(losses) if is_vector else tf.add_n(losses)
            return tape.gradient(loss, sources)

    def test_order(self):
        gradients = self.gradients(self.variables[::-1])
        # The last weight has none.
        self.assertIsNone(gradients[0])
        ordered = self.origins.in_order(gradients, self.variables)
        for mine, theirs in zip(ordered, gradients[::-1], strict=True):
            self.assertIs(mine, theirs)

    def test_what_is_not_known_stays(self):
        gradients = self.gradients(self.variables)
        gradients[0] = 2 * gradients[0]
        others = gradients[::-1]
        self.assertEqual(
            list(map(id, self.origins.in_order(others, self.variables))),
            list(map(id, others)),
        )

    def test_kind_of_loss(self):
        self.assertFalse(
            self.origins.is_of_vector(self.gradients(self.variables))
        )
        gradients = self.gradients(self.variables, is_vector=True)
        self.assertTrue(self.origins.is_of_vector(gradients))
        self.assertFalse(self.origins.is_of_vector([tf.zeros([2]), None]))


if __name__ == "__main__":
    tf.test.main()
