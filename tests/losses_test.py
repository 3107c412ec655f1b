"""What a window's losses add up to, from those that were recorded."""

import tensorflow as tf

from keras_accum import loss_tracker
from keras_accum import losses
from keras_accum import microbatch
from tests import test_utils


class HeldTest(test_utils.TestCase):
    def add(self, metric, loss, rows, weight, first):
        step = microbatch.Microbatch(None, first)
        with metric.recording(step.recorded_losses):
            metric.update_state(tf.constant(loss), sample_weight=rows)
        losses.add_recorded(metric, step, weight)
        # A second time there is nothing to add.
        losses.add_recorded(metric, step, weight)

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
