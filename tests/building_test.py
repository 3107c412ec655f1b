"""Variables that are made before they are needed."""

import keras
import tensorflow as tf

from keras_accum import building
from tests import test_utils


class OptimizerTest(test_utils.TestCase):
    def test_keras_builds_it_where_that_is_soon_enough(self):
        model = test_utils.accumulating()
        model.compile("adam", loss=test_utils.crossentropy())
        building.build_optimizer_early(model, is_needed=False)
        self.assertFalse(model.optimizer.built)
        building.build_optimizer_early(model, is_needed=True)
        self.assertTrue(model.optimizer.built)

    def test_loss_scales_are_variables(self):
        model = test_utils.accumulating()
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        model.compile(optimizer, loss=test_utils.crossentropy())
        building.build_optimizer_early(model, is_needed=False)
        self.assertTrue(optimizer.built)


if __name__ == "__main__":
    tf.test.main()
