"""Variables that are made before they are needed."""

import keras
import tensorflow as tf

from keras_accum import building
from tests import test_utils


class OptimizerTest(test_utils.TestCase):
    def test_it_is_built_once_and_outside_of_what_is_traced(self):
        model = test_utils.accumulating()
        model.compile("adam", loss=test_utils.crossentropy())
        weights = model.trainable_weights

        @tf.function(autograph=False)
        def program():
            traces.append(None)
            building.build_optimizer_early(
                model.distribute_strategy, model.optimizer, weights
            )

        traces = []
        program()
        variables = model.optimizer.variables
        self.assertLen(variables, 2 * len(weights) + 2)
        program()
        self.assertIs(model.optimizer.variables[-1], variables[-1])
        self.assertLen(traces, 1)

    def test_loss_scales_are_variables(self):
        model = test_utils.accumulating()
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        model.compile(optimizer, loss=test_utils.crossentropy())
        building.build_optimizer_early(
            model.distribute_strategy, optimizer, model.trainable_weights
        )
        self.assertTrue(optimizer.built)

    def test_keras_builds_it_where_nothing_is_traced(self):
        model = test_utils.accumulating()
        model.compile("adam", loss=test_utils.crossentropy())
        building.build_optimizer_early(
            model.distribute_strategy, model.optimizer, model.trainable_weights
        )
        self.assertEqual(
            model.optimizer.built,
            model.distribute_strategy.num_replicas_in_sync > 1,
        )

    def test_an_update_is_traced_once(self):
        # What makes variables is traced twice.
        class Counting(keras.optimizers.Adam):
            traces = 0

            def update_step(self, gradient, variable, learning_rate):
                self.traces += 1
                super().update_step(gradient, variable, learning_rate)

        model = test_utils.accumulating()
        model.compile(Counting(), loss=test_utils.crossentropy())
        batches = test_utils.dataset(test_utils.microbatches([2] * 4))
        model.fit(batches, verbose=0)
        self.assertEqual(model.optimizer.traces, len(model.trainable_weights))


if __name__ == "__main__":
    tf.test.main()
