"""Forward passes on some rows, which change nothing."""

import keras
import numpy as np
import tensorflow as tf

from keras_accum import trial
from tests import test_utils


class Noise(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self._seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        noise = keras.random.normal(keras.ops.shape(x), seed=self._seeds)
        windows = keras.ops.reshape(x, (-1, 2))
        return (
            x
            + noise
            + keras.ops.reshape(
                keras.random.dropout(windows, 0.5, seed=self._seeds),
                keras.ops.shape(x),
            )
        )


class TrialTest(test_utils.TestCase):
    def test_a_row_is_alike_in_the_whole_and_in_a_part(self):
        x = keras.Input((6,))
        hidden = keras.layers.Dropout(0.5)(Noise()(x))
        hidden = keras.layers.BatchNormalization()(hidden)
        hidden = keras.layers.ActivityRegularization(l2=1.0)(hidden)
        model = keras.Model(x, {"a": hidden})
        x = tf.constant(np.random.default_rng(0).normal(size=(8, 6)))
        before = [np.array(v) for v in model.variables]
        whole = trial.of_whole(model, x)
        self.assertLen(whole.moments, 1)
        for start, stop in ((0, 3), (3, 8)):
            part = trial.of_part(model, x, start, stop, whole)
            self.assertAllClose(
                part.y_pred["a"], whole.y_pred["a"][start:stop], 1e-5, 1e-5
            )
            self.assertEqual(part.added_by, whole.added_by)
            self.assertEqual(set(part.assigned), set(whole.assigned))
        self.assertLen(whole.added, 1)
        after = [np.array(v) for v in model.variables]
        self.assertAllClose(before, after, 0, 0)


if __name__ == "__main__":
    tf.test.main()
