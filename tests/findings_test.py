"""What is known of losses."""

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum.coupling import Kind
from keras_accum.findings import Findings


class FindingsTest(tf.test.TestCase):
    def test_names_of_coupled_losses(self):
        x = keras.Input((2,))
        model = keras.Model(x, [x, x])
        model.compile(loss=["mse", keras.losses.Dice()])
        batch = [tf.zeros((3, 2))] * 2
        compiled = compat.compiled_loss(model)
        compat.build_compiled_losses(compiled, batch, batch, None)
        found = Findings((Kind.MEAN, Kind.COUPLED))
        self.assertTrue(found.couples_rows)
        self.assertEqual(found.coupled_names(model), ["dice"])
        found = Findings(compute_loss=Kind.COUPLED)
        self.assertEqual(found.coupled_names(model), ["compute_loss"])
        for kinds in ((), (None, Kind.MEAN), (Kind.ROW_MEAN, Kind.SUM)):
            self.assertFalse(Findings(kinds).couples_rows)


if __name__ == "__main__":
    tf.test.main()
