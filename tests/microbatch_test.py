"""What is known of a micro-batch, and what is recorded of it."""

import threading

import keras
import numpy as np
import tensorflow as tf

from keras_accum import calls
from keras_accum import microbatch


def call_of(gradients, variables=None):
    """A call of `accumulate`."""
    return calls.Call(None, variables or [None] * len(gradients), gradients, 1)


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
        call = call_of([value, None])
        self.assertIs(step.gradients_or_nothing(call), call.gradients)

    def test_without_rows_it_counts_for_nothing(self):
        step = microbatch.Microbatch(None, True, tf.constant(False))
        self.assertAllEqual(step.or_nothing(tf.constant(np.nan)), 0.0)
        self.assertAllEqual(step.value_or(np.nan, 3.0), 3.0)
        self.assertIsNone(step.or_nothing(None))
        variable = object()
        step.gradients_without_rows = {id(variable): tf.constant([3.0])}
        for _ in range(2):
            step.record(call_of([tf.constant([np.nan])], [variable]), ())
        regularized, other = map(step.gradients_or_nothing, step.calls)
        # They belong to one call alone.
        self.assertAllEqual(regularized, [[3.0]])
        self.assertAllEqual(other, [[0.0]])

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

    def test_all_gradients_must_be_finite(self):
        for found in ((True, False), (False, True)):
            variable = keras.Variable([1.0])
            step = microbatch.Microbatch(
                None, True, nonfinite="skip_microbatch"
            )
            with step, step.watched(layers=True):
                variable.assign([2.0])
                step.find_finite(tf.constant(found[0]))
                variable.assign([3.0])
                step.find_finite(tf.constant(found[1]))
                variable.assign([4.0])
            self.assertAllEqual(variable, [1.0])
            self.assertAllEqual(step.is_finite, False)

    def test_gradients_are_looked_at_once(self):
        step = microbatch.Microbatch(None, True)
        some, other = tf.ones(1), tf.ones(1)
        self.assertLen(step.not_looked_at([some, None]), 1)
        (new,) = step.not_looked_at([some, other])
        self.assertIs(new, other)

    def test_the_first_is_told_once_by_the_buffers(self):
        count = tf.Variable(1)
        step = microbatch.Microbatch(None, lambda: tf.equal(count, 0))
        count.assign(0)
        self.assertAllEqual(step.is_first, True)
        count.assign(1)
        self.assertAllEqual(step.is_first, True)


class MeasureTest(tf.test.TestCase):
    def test_once_for_the_same_tensors(self):
        step, measures = microbatch.Microbatch(None, True), []

        def measure():
            measures.append(1)
            return len(measures)

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
