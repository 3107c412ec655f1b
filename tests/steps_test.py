"""One step on one micro-batch."""

import keras
import tensorflow as tf

import keras_accum
from keras_accum import steps
from tests import test_utils


class Averaging(keras_accum.GradientAccumulationModel):
    """Has averages: of a weight in each step, and of another in an update."""

    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.average = self.add_weight(name="average", trainable=False)
        self.in_update = self.add_weight(name="in_update", trainable=False)

    def call(self, x):
        return self.network(x)

    def train_step(self, data):
        self.average.assign(tf.reduce_mean(self.network.weights[0]))
        return super().train_step(data)

    def update_step(self):
        super().update_step()
        self.in_update.assign(tf.reduce_mean(self.network.weights[0]))


class StepTest(test_utils.TestCase):
    def step_of(self, train_step):
        cls = type(
            "Mine",
            (keras_accum.GradientAccumulationModel,),
            {"train_step": train_step},
        )
        model = test_utils.mlp(cls, accum_steps=2)
        model.compile("sgd", loss=test_utils.crossentropy())
        return model

    def test_a_step_that_forgets_to_accumulate(self):
        model = self.step_of(lambda self, data: {})
        with self.assertRaisesRegex(RuntimeError, "without a call"):
            steps.train_microbatch(model._accumulation, True, None)

    def test_a_step_that_updates(self):
        def update(model, data):
            zeros = [tf.zeros(v.shape) for v in model.trainable_weights]
            model.optimizer.apply(zeros, model.trainable_weights)

        model = self.step_of(update)
        with self.assertRaisesRegex(
            RuntimeError, r"leave the update.*steps_test.py:\d+"
        ):
            steps.train_microbatch(model._accumulation, True, None)

    def test_warns_of_what_it_assigns(self):
        model = Averaging(test_utils.mlp(keras.Model), accum_steps=2)
        model.compile("sgd", "mse", metrics=["mae"])
        batch = test_utils.microbatches([2])[0]
        batch = batch[0], tf.one_hot(batch[1], 3)
        with self.assertWarnsRegex(UserWarning, r"assigns `.*average`\. It"):
            steps.train_microbatch(model._accumulation, True, batch)
        # Once; and what belongs to the update is no news.
        steps.train_microbatch(model._accumulation, False, batch)
        model.update_step()

    def test_evaluation_keeps_its_function(self):
        model = test_utils.mlp(
            keras_accum.GradientAccumulationModel, microbatch_size=2
        )
        model.compile("sgd", loss=test_utils.crossentropy())
        model.test_function = function = object()
        batch = tuple(map(tf.constant, test_utils.microbatches([2])[0]))
        logs = steps.test_microbatch(model._accumulation, True, batch)
        self.assertEqual(list(logs), ["loss"])
        self.assertIs(model.test_function, function)


if __name__ == "__main__":
    tf.test.main()
