"""Which methods are a user's own."""

import keras
import tensorflow as tf

import keras_accum
from tests import test_utils


class CustomTest(test_utils.TestCase):
    def test_steps_behind_the_mixin_and_weights(self):
        class Theirs(keras.Model):
            def train_step(self, data):
                return {}

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            def microbatch_weight(self, x, y, y_pred, sample_weight=None):
                return 1.0

        class InFront(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                return {}

        for model, behind, anywhere in (
            (test_utils.accumulating(), [], []),
            (
                Mine(accum_steps=2),
                ["train_step", "microbatch_weight"],
                ["train_step", "microbatch_weight"],
            ),
            (InFront(accum_steps=2), [], ["train_step"]),
        ):
            for in_front, expected in ((False, behind), (True, anywhere)):
                custom = [
                    name
                    for name in ("train_step", "test_step", "microbatch_weight")
                    if model._accumulation.is_custom(name, in_front=in_front)
                ]
                self.assertEqual(custom, expected)


if __name__ == "__main__":
    tf.test.main()
