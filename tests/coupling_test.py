"""Cut points, and the denominators of kinds."""

import keras
import tensorflow as tf

from keras_accum import coupling
from keras_accum import weighting
from keras_accum.coupling import Kind
from tests import test_utils


class CouplingTest(test_utils.TestCase):
    def test_cuts_are_inside(self):
        for rows in range(2, 17):
            for cut in coupling.cuts(rows):
                self.assertBetween(cut, 1, rows - 1)

    def test_kinds_have_their_denominators(self):
        loss = keras.losses.MeanSquaredError()
        batch = tf.zeros((3, 2)), tf.ones((3, 2)), None
        denominator = weighting.loss_denominator
        self.assertIsNone(denominator(loss, *batch, 5, Kind.SUM))
        self.assertEqual(denominator(loss, *batch, 5, Kind.ROW_MEAN).value, 5)
        self.assertEqual(denominator(loss, *batch, 5).value, 3)


if __name__ == "__main__":
    tf.test.main()
