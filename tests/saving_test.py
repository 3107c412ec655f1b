"""The arguments that are ours, in a configuration."""

import tensorflow as tf

import keras_accum
from keras_accum import saving
from tests import test_utils


class ArgumentsTest(test_utils.TestCase):
    def test_make_a_model_like_it(self):
        given = {"accum_steps": 3, "nonfinite": "skip_window"}
        model = test_utils.accumulating(**given)
        found = saving.arguments_of(model)
        self.assertEqual(found | given, found)
        other = test_utils.accumulating(**found)
        self.assertEqual(saving.arguments_of(other), found)

    def test_an_effective_batch_size_is_given_alone(self):
        model = test_utils.accumulating(
            accum_steps=1, effective_batch_size=8, partial_window="drop"
        )
        model.compile("sgd", loss=test_utils.crossentropy())
        x, y = test_utils.microbatches([8])[0]
        model.fit(x, y, batch_size=4, verbose=0)
        self.assertEqual(model.accum_steps, 2)
        found = saving.arguments_of(model)
        self.assertEqual(found["accum_steps"], 1)
        self.assertEqual(found["effective_batch_size"], 8)

    def test_of_a_configuration_one_size_is_set(self):
        config = {"accum_steps": 1, "microbatch_size": 4, "name": "model"}
        self.assertEqual(saving.settable(config), {"microbatch_size": 4})
        config = {"accum_steps": 2, "partial_window": "carry"}
        self.assertEqual(saving.settable(config), config)

    def test_schedules_are_objects(self):
        schedule = keras_accum.schedules.LinearRamp(1, 4, 10)
        self.assertEqual(
            saving.serialized(schedule)["class_name"], "LinearRamp"
        )
        self.assertEqual(saving.serialized(3), 3)


if __name__ == "__main__":
    tf.test.main()
