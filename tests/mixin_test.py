"""What models that accumulate have of Keras."""

import keras
import tensorflow as tf

import keras_accum
from keras_accum import mixin
from tests import test_utils


class CustomTest(test_utils.TestCase):
    def test_steps_behind_the_mixin_and_weights(self):
        class Theirs(keras.Model):
            def train_step(self, data):
                return {}

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            def microbatch_weight(self, x, y, y_pred, sample_weight=None):
                return 1.0

        for model, expected in (
            (test_utils.accumulating(), []),
            (Mine(accum_steps=2), ["train_step", "microbatch_weight"]),
        ):
            custom = [
                name
                for name in ("train_step", "test_step", "microbatch_weight")
                if mixin.is_custom(model, name)
            ]
            self.assertEqual(custom, expected)

    def test_what_is_ours_is_not_tracked(self):
        model, plain = test_utils.accumulating(), test_utils.mlp()
        for each in (model, plain):
            each.compile("adam", loss=test_utils.crossentropy())
            test_utils.train_on(each, test_utils.microbatches([4] * 4))
        self.assertEqual(
            [(v.name, v.shape) for v in model.variables],
            [(v.name, v.shape) for v in plain.variables],
        )
        self.assertEqual(
            set(model._trackable_children()), set(plain._trackable_children())
        )


if __name__ == "__main__":
    tf.test.main()
