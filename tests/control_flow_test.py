"""What runs when: after a batch is there, after all ops, in a branch."""

import tensorflow as tf

from keras_accum import control_flow


class ChooseTest(tf.test.TestCase):
    def test_python_picks_or_the_device(self):
        def choose(condition):
            return control_flow.choose(
                condition, lambda: tf.constant(1), lambda: tf.constant(2)
            )

        graph = tf.function(choose, autograph=False)
        for condition, expected in ((True, 1), (False, 2)):
            self.assertAllEqual(choose(condition), expected)
            self.assertAllEqual(graph(condition), expected)
            self.assertAllEqual(graph(tf.constant(condition)), expected)
        operations = graph.get_concrete_function(True).graph.get_operations()
        self.assertNotIn("If", [op.type for op in operations])


class NoBatchTest(tf.test.TestCase):
    def test_runs_nothing(self):
        runs, index = tf.Variable(0), tf.Variable(5, dtype=tf.int64)

        def count():
            runs.assign_add(1)
            return tf.constant(0)

        @tf.function(autograph=False)
        def step(iterator):
            return control_flow.if_there(next(iterator), count, index)

        iterator = iter(tf.data.Dataset.range(2))
        step(iterator)
        step(iterator)
        with self.assertRaises(tf.errors.OutOfRangeError):
            step(iterator)
        self.assertAllEqual(runs, 2)


class AfterTest(tf.test.TestCase):
    def test_what_fails_before_stops_what_waits(self):
        variable = tf.Variable(0.0)

        @tf.function(autograph=False)
        def step(value):
            tf.debugging.assert_positive(value)
            with tf.control_dependencies(control_flow.after_all_ops()):
                variable.assign_add(1.0)

        step(tf.constant(1.0))
        with self.assertRaises(tf.errors.InvalidArgumentError):
            step(tf.constant(-1.0))
        self.assertAllEqual(variable, 1.0)

    def test_eagerly_all_is_over(self):
        self.assertEmpty(control_flow.after_all_ops())

    def test_finds_tensors_among_other_leaves(self):
        rows = tf.IndexedSlices(tf.zeros((1, 2)), tf.constant([0]))
        found = control_flow.tensors_in({"a": None, "b": 3, "c": [rows]})
        self.assertLen(found, 2)


if __name__ == "__main__":
    tf.test.main()
