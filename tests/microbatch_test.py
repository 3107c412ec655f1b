"""What is known of a micro-batch, and what is recorded of it."""

import threading

import keras
import numpy as np
import tensorflow as tf

from keras_accum import microbatch


class CurrentTest(tf.test.TestCase):
    def test_is_of_its_model_and_its_thread(self):
        mine, other = object(), object()
        seen = []
        with microbatch.Microbatch(mine, True) as step:
            self.assertIs(microbatch.current(mine), step)
            self.assertIsNone(microbatch.current(other))
            thread = threading.Thread(
                target=lambda: seen.append(microbatch.current(mine))
            )
            thread.start()
            thread.join()
        self.assertEqual(seen, [None])
        self.assertIsNone(microbatch.current(mine))


class CountsTest(tf.test.TestCase):
    def test_counts_for_certain(self):
        step = microbatch.Microbatch(None, True)
        self.assertIsNone(step.counts)
        value = tf.constant(2.0)
        self.assertIs(step.or_nothing(value), value)
        self.assertEqual(
            step.gradients_or_nothing([value, None], [0, 1]), [value, None]
        )

    def test_without_rows_it_counts_for_nothing(self):
        step = microbatch.Microbatch(None, True, tf.constant(False))
        self.assertAllEqual(step.or_nothing(tf.constant(np.nan)), 0.0)
        self.assertAllEqual(step.value_or(np.nan, 3.0), 3.0)
        self.assertIsNone(step.or_nothing(None))
        (gradient,) = step.gradients_or_nothing([tf.constant([np.nan])], [0])
        self.assertAllEqual(gradient, [0.0])

    def test_what_it_assigned_is_taken_back(self):
        variable = keras.Variable([1.0])
        step = microbatch.Microbatch(None, True, nonfinite="skip_microbatch")
        with step, step.watched(layers=True):
            variable.assign([2.0])
            variable.assign([3.0])
            step.find_finite(tf.constant(False))
            # From here on, what is assigned is selected.
            variable.assign([4.0])
        self.assertAllEqual(variable, [1.0])
        self.assertEqual(list(step.assigned), [id(variable)])

    def test_the_first_may_be_known_later(self):
        count = tf.Variable(0)
        step = microbatch.Microbatch(None, lambda: tf.equal(count, 0))
        self.assertAllEqual(step.is_first, True)
        count.assign(1)
        self.assertAllEqual(step.is_first, False)


class MeasureTest(tf.test.TestCase):
    def test_once_for_the_same_tensors(self):
        step, calls = microbatch.Microbatch(None, True), []

        def measure():
            calls.append(1)
            return len(calls)

        x, y = tf.ones(2), tf.ones(2)
        self.assertEqual(step.measured((x, {"a": y}), measure), 1)
        self.assertEqual(step.measured((x, {"a": y}), measure), 1)
        self.assertEqual(step.measured((x, {"a": tf.ones(2)}), measure), 2)

    def test_tensors_of_a_branch_stay_there(self):
        step = microbatch.Microbatch(None, True)

        @tf.function
        def inner(x):
            return step.measured((x,), lambda: x + 1.0)

        self.assertAllEqual(inner(tf.constant(1.0)), 2.0)
        self.assertAllEqual(step.measured((), lambda: 5.0), 5.0)


if __name__ == "__main__":
    tf.test.main()
