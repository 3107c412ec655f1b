"""The reported loss, against arithmetic by hand."""

import tensorflow as tf

from keras_accum import loss_tracker
from tests import test_utils


def added(*microbatches):
    metric = loss_tracker.WindowLoss()
    for loss, weight, rows in microbatches:
        metric.add(tf.constant(loss), weight, tf.constant(rows))
    return metric


class WindowLossTest(test_utils.TestCase):
    def test_within_a_window(self):
        # (3 * 2 + 1 * 6) / 4
        self.assertAllClose(added((2.0, 3.0, 8), (6.0, 1.0, 8)).result(), 3.0)

    def test_windows_count_by_rows(self):
        metric = added((2.0, 3.0, 8), (6.0, 1.0, 8))
        metric.close()
        metric.add(tf.constant(11.0), 100.0, tf.constant(4))
        # (16 * 3 + 4 * 11) / 20
        self.assertAllClose(metric.result(), 4.6)
        metric.close()
        self.assertAllClose(metric.result(), 4.6)

    def test_sums_add_up(self):
        metric = added((2.0, None, 8), (6.0, None, 8))
        self.assertAllClose(metric.result(), 8.0)
        metric.close()
        metric.add(tf.constant(5.0), None, tf.constant(16))
        self.assertAllClose(metric.result(), (16 * 8 + 16 * 5) / 32)

    def test_unreduced_losses_are_averaged_as_in_keras(self):
        metric = added(([1.0, 3.0], None, 2), ([5.0], None, 1))
        self.assertAllClose(metric.result(), 3.0)

    def test_reset_forgets_the_window(self):
        metric = added((2.0, 3.0, 8))
        metric.reset_state()
        self.assertAllEqual(metric.result(), 0.0)
        metric.add(tf.constant(6.0), None, tf.constant(8))
        self.assertAllClose(metric.result(), 6.0)

    def test_evaluation_uses_it_as_a_mean(self):
        metric = added()
        metric.update_state(2.0, sample_weight=3)
        metric.update_state(6.0, sample_weight=1)
        self.assertAllClose(metric.result(), 3.0)

    def test_holds_back_what_it_is_given(self):
        metric, recorded = added(), {}
        with metric.recording(recorded):
            metric.update_state(2.0, sample_weight=8)
        self.assertEqual(recorded, {id(metric): (2.0, 8)})
        self.assertAllEqual(metric.result(), 0.0)
        metric.update_state(3.0, sample_weight=1)
        self.assertAllClose(metric.result(), 3.0)

    def test_it_has_the_variables_of_a_mean(self):
        self.assertEqual(
            [v.name for v in added().variables], ["total", "count"]
        )


if __name__ == "__main__":
    tf.test.main()
