"""Finding the optimizers of a step before it is traced for good."""

import keras
import tensorflow as tf

from keras_accum import discovery
from tests import own_steps_cases as cases
from tests import test_utils


class DiscoveryTest(test_utils.TestCase):
    def model(self, wrap=lambda optimizer: optimizer, **kwargs):
        model = cases.GAN(**({"accum_steps": 2} | kwargs))
        model.compile(**cases.gan_optimizers(wrap))
        return model

    def find(self, model):
        @tf.function(autograph=False)
        def traced(*batch):
            discovery.find_optimizers(model._accumulation, batch)

        traced.get_concrete_function(*cases.gan_batches([4])[0])

    def test_where_something_depends_on_them(self):
        for kwargs in (
            {"wrap": keras.optimizers.LossScaleOptimizer},
            {"accum_steps": lambda updates: 2},
        ):
            model = self.model(**kwargs)
            before = model.get_weights()
            self.assertTrue(discovery.is_needed(model._accumulation))
            # Run eagerly, nothing is traced.
            batch = cases.gan_batches([4])[0]
            discovery.find_optimizers(model._accumulation, batch)
            self.assertFalse(model.d_optimizer.built)
            self.find(model)
            self.assertTrue(model.d_optimizer.built)
            self.assertTrue(model.g_optimizer.built)
            self.assertFalse(discovery.is_needed(model._accumulation))
            self.assertAllClose(before, model.get_weights(), 0, 0)
            self.assertEqual(test_utils.num_microbatches(model), 0)

    def test_nothing_is_traced_without_need(self):
        model = self.model()
        self.assertFalse(discovery.is_needed(model._accumulation))
        self.find(model)
        self.assertFalse(model.d_optimizer.built)
        # Ours makes the variables of its optimizer by itself.
        model = test_utils.accumulating()
        optimizer = keras.optimizers.SGD()
        model.compile(
            keras.optimizers.LossScaleOptimizer(optimizer), loss="mse"
        )
        self.assertFalse(discovery.is_needed(model._accumulation))

    def test_attributes_in_lists_and_dicts(self):
        class Holder:
            def __init__(self):
                self.one, self.some, self.named = 1, [2, 3], {"four": 4}

        self.assertEqual(list(discovery.attributes(Holder())), [1, 2, 3, 4])


class BatchTest(test_utils.TestCase):
    def test_makes_all_variables_and_runs_nothing(self):
        model = test_utils.accumulating()
        model.compile(
            "adam", loss=test_utils.crossentropy(), metrics=["accuracy"]
        )
        before = model.get_weights()
        batch = tuple(map(tf.constant, test_utils.microbatches([4])[0]))
        discovery.build_for(model._accumulation, batch)
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
            discovery.build_for_resumed(model._accumulation, data)

        step(*batch)
        self.assertFalse(model.optimizer.built)
        model._accumulation.position.move_to(1, 4)
        losses = model._accumulation.window["losses"]
        losses.make_tracker()
        losses.restore(losses.state())
        step.get_concrete_function(*(tf.concat([b, b], 0) for b in batch))
        self.assertTrue(model.optimizer.built)


if __name__ == "__main__":
    tf.test.main()
