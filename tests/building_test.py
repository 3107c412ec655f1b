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


class BatchTest(test_utils.TestCase):
    def test_makes_all_variables_and_runs_nothing(self):
        model = test_utils.accumulating()
        model.compile(
            "adam", loss=test_utils.crossentropy(), metrics=["accuracy"]
        )
        before = model.get_weights()
        batch = tuple(map(tf.constant, test_utils.microbatches([4])[0]))
        building.build_for(model._accumulation, batch)
        self.assertTrue(model.optimizer.built)
        # The loss's and the accuracy's.
        self.assertLen(model.metrics_variables, 4)
        self.assertAllEqual(model.metrics_variables[0], 0.0)
        self.assertAllClose(before, model.get_weights(), 0, 0)

    def test_an_empty_window_needs_none(self):
        model = test_utils.accumulating()
        model.compile("adam", loss=test_utils.crossentropy())
        batch = tuple(map(tf.constant, test_utils.microbatches([4])[0]))

        @tf.function(autograph=False)
        def step(*data):
            building.build_for_resumed(model._accumulation, data, True)

        step(*batch)
        self.assertFalse(model.optimizer.built)
        model._accumulation.position.move_to(1, 4)
        step.get_concrete_function(*(tf.concat([b, b], 0) for b in batch))
        self.assertTrue(model.optimizer.built)


if __name__ == "__main__":
    tf.test.main()
