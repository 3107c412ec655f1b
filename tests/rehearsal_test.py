"""Updates are computed, and change nothing."""

import threading

import numpy as np
import tensorflow as tf

from keras_accum import rehearsal


class RehearsalTest(tf.test.TestCase):
    def test_computing_assignments(self):
        variable = tf.Variable([1.0, 2.0])

        @tf.function
        def assign():
            with rehearsal.computing_assignments():
                variable.assign([3.0, 3.0])
                variable.assign_add([3.0, 3.0])
                variable.assign_sub([3.0, 3.0])
                variable.scatter_add(tf.IndexedSlices([1.0], [0], [2]))

        assign()
        self.assertAllEqual(variable, [1.0, 2.0])
        variable.assign_add([1.0, 1.0])
        self.assertAllEqual(variable, [2.0, 3.0])

    def test_computed_assignments_may_fail(self):
        variable = tf.Variable(1.0)

        @tf.function
        def assign(value):
            with rehearsal.computing_assignments():
                variable.assign(tf.debugging.check_numerics(value, "NaN"))

        with self.assertRaises(tf.errors.InvalidArgumentError):
            assign(np.nan)

    def test_what_other_threads_trace_is_assigned(self):
        variable, other = tf.Variable(1.0), tf.Variable(1.0)

        @tf.function
        def assign_other():
            other.assign(5.0)
            other.assign_add(1.0)

        @tf.function
        def assign():
            with rehearsal.computing_assignments():
                thread = threading.Thread(target=assign_other)
                thread.start()
                thread.join()
                variable.assign(3.0)

        assign()
        self.assertAllEqual(other, 6.0)
        # It was traced in the meantime, and once.
        assign_other()
        self.assertEqual(assign_other.experimental_get_tracing_count(), 1)
        self.assertAllEqual(other, 6.0)
        self.assertAllEqual(variable, 1.0)


if __name__ == "__main__":
    tf.test.main()
