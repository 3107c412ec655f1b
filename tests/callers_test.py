"""The line that called Keras is that of a user."""

import keras
import tensorflow as tf

from keras_accum import callers


class CallersTest(tf.test.TestCase):
    def test_line_of_caller(self):
        line = callers.line_of_caller()
        self.assertRegex(line, r"callers_test\.py:\d+: line = callers\.line_of")

    def test_lines_of_keras_and_ours_are_passed_by(self):
        lines = []
        # As if it were in our package.
        code = compile(
            "def note(logs): lines.append(line_of_caller())",
            callers.__file__,
            "exec",
        )
        namespace = {"lines": lines, "line_of_caller": callers.line_of_caller}
        exec(code, namespace)
        callback = keras.callbacks.LambdaCallback(
            on_train_begin=namespace["note"]
        )
        callbacks = keras.callbacks.CallbackList([callback])
        callbacks.on_train_begin()
        self.assertRegex(lines[0], r"callers_test\.py:\d+: callbacks\.on_train")


class PathTest(tf.test.TestCase):
    def test_a_loop_is_one_place(self):
        def place():
            return callers.path_from(start)

        def step():
            looped = [place() for _ in range(2)]
            return [*looped, place(), place()]

        def start():
            return step()

        first, second, third, last = start()
        self.assertEqual(first, second)
        self.assertLen({first, third, last}, 3)
        # And it is the same the next time.
        self.assertEqual([first, second, third, last], start())


if __name__ == "__main__":
    tf.test.main()
