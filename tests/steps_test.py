"""One step on one micro-batch."""

import tensorflow as tf

import keras_accum
from keras_accum import steps
from tests import test_utils


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
