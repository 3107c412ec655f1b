"""Which methods are a user's own."""

import keras
import tensorflow as tf

import keras_accum
from keras_accum import overrides
from tests import test_utils

NAMES = ("train_step", "test_step")


class Theirs(keras.Model):
    def train_step(self, data):
        return {}


class Adding(keras.Model):
    def train_step(self, data):
        return super().train_step(data) | {"more": 1.0}


class Mine(keras_accum.GradientAccumulationMixin, Theirs):
    def microbatch_weight(self, x, y, y_pred, sample_weight=None):
        return 1.0


class InFront(keras_accum.GradientAccumulationModel):
    def train_step(self, data):
        return {}

    def test_step(self, data):
        return super().test_step(data)


class Behind(keras_accum.GradientAccumulationMixin, Adding):
    pass


class OverridesTest(test_utils.TestCase):
    def test_steps_and_weights(self):
        for cls, behind, replaced, steps in (
            (keras_accum.GradientAccumulationModel, [], [], []),
            (Mine, ["train_step"], ["train_step"], ["train_step"]),
            (InFront, [], ["train_step"], ["train_step", "test_step"]),
            (Behind, ["train_step"], [], ["train_step"]),
        ):
            found = overrides.Overrides(
                cls(accum_steps=2), keras_accum.GradientAccumulationMixin
            )
            self.assertEqual(list(filter(found.is_behind, NAMES)), behind)
            self.assertEqual(list(filter(found.replaces, NAMES)), replaced)
            self.assertEqual(list(filter(found.step, NAMES)), steps)
            self.assertEqual(found.has("microbatch_weight"), cls is Mine)
            self.assertFalse(found.has("update_step"))


if __name__ == "__main__":
    tf.test.main()
