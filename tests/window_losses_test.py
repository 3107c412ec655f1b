"""The losses of a window that `fit` reports."""

import tensorflow as tf

from keras_accum import compat
from keras_accum import loss_tracker
from keras_accum import microbatch
from keras_accum import window_losses
from tests import test_utils


class WindowLossesTest(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        self.model = test_utils.mlp()
        self.model.compile("sgd", loss=test_utils.crossentropy())
        self.part = window_losses.WindowLosses(self.model)

    def test_takes_the_place_of_keras_metric(self):
        self.assertEmpty(self.part.trackers)
        tracker = self.part.make_tracker()
        self.assertIs(self.part.make_tracker(), tracker)
        self.assertIs(compat.loss_tracker(self.model), tracker)
        self.assertEqual(self.part.trackers, [tracker])

    def test_a_window_counts_as_one_batch(self):
        tracker = self.part.make_tracker()
        tracker.add(tf.constant(2.0), tf.constant(3.0), tf.constant(3))
        tracker.add(tf.constant(6.0), tf.constant(1.0), tf.constant(1))
        self.part.close(self.part.sums(), None)
        self.assertAllClose(tracker.result(), 3.0)
        self.assertAllClose(tracker.count, 4.0)
        # One that is left without an update counts for nothing.
        tracker.add(tf.constant(9.0), tf.constant(1.0), tf.constant(4))
        self.part.close(self.part.sums(), tf.constant(False))
        self.assertAllClose(tracker.result(), 3.0)

    def test_a_checkpoint_goes_on_when_an_epoch_has_begun(self):
        tracker = self.part.make_tracker()
        tracker.add(tf.constant(2.0), tf.constant(3.0), tf.constant(3))
        state = self.part.state()
        self.model.reset_metrics()
        self.part.restore(state)
        self.model.reset_metrics()
        self.assertTrue(self.part.is_restored)
        self.assertAllEqual(tracker.result(), 0.0)
        self.part.resume()
        self.assertFalse(self.part.is_restored)
        self.assertAllClose(tracker.result(), 2.0)
        # What waits for `resume` is forgotten with the window.
        self.part.restore(state)
        self.part.reset()
        self.assertFalse(self.part.is_restored)
        # So it is where the window has ended, by hand.
        self.part.restore(state)
        self.part.close(self.part.sums(), None)
        self.assertFalse(self.part.is_restored)


class RecordedTest(test_utils.TestCase):
    def add(self, metric, loss, rows, weight, first):
        step = microbatch.Microbatch(None, first)
        with metric.recording(step.recorded_losses):
            metric.update_state(tf.constant(loss), sample_weight=rows)
        window_losses.add_recorded(metric, step, weight)
        # A second time there is nothing to add.
        window_losses.add_recorded(metric, step, weight)

    def test_are_added_with_their_weight(self):
        metric = loss_tracker.WindowLoss()
        self.add(metric, 2.0, 8, 3.0, True)
        self.add(metric, 6.0, 8, 1.0, False)
        self.assertAllClose(metric.result(), 3.0)
        metric.close()
        # Of unknown numbers of rows, each window counts once.
        self.add(metric, 5.0, None, None, True)
        self.add(metric, 5.0, None, None, False)
        self.assertAllClose(metric.result(), (16 * 3 + 1 * 10) / 17)


if __name__ == "__main__":
    tf.test.main()
