"""The end of a window."""

import tensorflow as tf

import keras_accum
from keras_accum import boundary
from tests import test_utils


class Counting(keras_accum.GradientAccumulationModel):
    """Has an `update_step` of its own, as a user may have."""

    def update_step(self):
        super().update_step()
        self.updates.assign_add(1.0)


class OverrideTest(test_utils.TestCase):
    def test_an_override_takes_no_arguments_and_reduces_once(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        model_of = {}
        for cls in (keras_accum.GradientAccumulationModel, Counting):
            with strategy.scope():
                model = test_utils.mlp(cls, accum_steps=2)
                model.updates = tf.Variable(
                    0.0,
                    trainable=False,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.SUM,
                )
                model.compile("adam", loss=test_utils.crossentropy())
            batches = test_utils.microbatches([4] * 4)
            model.fit(test_utils.dataset(batches), verbose=0)
            model_of[cls] = model
        plain, counting = model_of.values()
        self.assertAllClose(plain.get_weights(), counting.get_weights(), 0, 0)
        # Two windows, on each replica.
        replicas = strategy.num_replicas_in_sync
        self.assertAllEqual(counting.updates, 2.0 * replicas)

    def test_by_hand_it_finds_out_by_itself(self):
        model = test_utils.mlp(Counting, accum_steps=2)
        model.updates = tf.Variable(0.0)
        model.compile("sgd", loss=test_utils.crossentropy())
        before = model.get_weights()
        model.train_step(test_utils.microbatches([4])[0])
        model.update_step()
        self.assertAllEqual(model.updates, 1.0)
        self.assertNotAllClose(before, model.get_weights())


class NoWeightsTest(test_utils.TestCase):
    def test_replicas_have_nothing_to_train(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        with strategy.scope():
            model = test_utils.accumulating(accum_steps=2)
            model.trainable = False
            model.compile("sgd", loss=test_utils.crossentropy())
        batches = test_utils.microbatches([4] * 4)
        with self.assertWarnsRegex(UserWarning, "any trainable weights"):
            logs = model.fit(test_utils.dataset(batches), verbose=0).history
        plain = test_utils.mlp()
        plain.compile("sgd", loss=test_utils.crossentropy())
        x, y = test_utils.concatenate(batches)
        expected = plain.evaluate(x, y, verbose=0)
        self.assertAllClose(logs["loss"][0], expected, rtol=1e-5)


class LogsTest(tf.test.TestCase):
    def test_those_of_all_replicas_replace_ones_own(self):
        logs = {"loss": tf.constant(1.0, tf.float64), "mine": "kept"}
        of_all = {"loss": tf.constant(2.0), "other": tf.constant(3.0)}
        found = boundary.merge_logs(logs, of_all)
        self.assertEqual(list(found), ["loss", "mine"])
        self.assertAllEqual(found["loss"], 2.0)
        self.assertEqual(found["loss"].dtype, tf.float64)
        self.assertIs(boundary.merge_logs(logs, None), logs)


if __name__ == "__main__":
    tf.test.main()
