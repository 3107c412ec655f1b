"""Where in its window a micro-batch is, as Python and TensorFlow count it."""

import tensorflow as tf
from absl.testing import parameterized

from keras_accum import options
from keras_accum import position
from tests import test_utils


def at_start(accum_steps):
    """Returns the position of a model that has not trained."""
    return position.Position(options.Options(accum_steps=accum_steps))


def run(state, microbatches):
    """Returns the positions at which the window was full."""
    state.write()
    full = []
    for index in range(microbatches):
        if state.read()[0] == 0:
            state.begin(state.completed)
        if state.advance():
            full.append(index)
            state.complete()
    return full


class WindowTest(test_utils.TestCase):
    def test_ends_every_k(self):
        state = at_start(3)
        self.assertEqual(run(state, 10), [2, 5, 8])
        self.assertEqual(state.read(), (1, 3))
        self.assertEqual(state.completed, 3)

    def test_change_waits_for_the_next_window(self):
        state = at_start(3)
        self.assertEqual(run(state, 2), [])
        state.set_options(options.Options(accum_steps=2))
        self.assertEqual(run(state, 5), [0, 2, 4])

    def test_function_gets_ints_once_a_window(self):
        seen = []

        def schedule(updates):
            self.assertIs(type(updates), int)
            seen.append(updates)
            return updates + 1

        state = at_start(schedule)
        self.assertEqual(run(state, 7), [0, 2, 5])
        self.assertEqual(seen, [0, 1, 2, 3])


class CountingTest(test_utils.TestCase, parameterized.TestCase):
    def counted(self, state, microbatches, asks=False):
        """Returns where first and last micro-batches are, counted in Python."""
        first, last = [], []
        is_first = state.read()[0] == 0
        for index in range(microbatches):
            is_last = state.next_is_last()
            if asks:
                self.assertEqual(state.read()[0] == 0, is_first)
            first += [index] * is_first
            last += [index] * is_last
            is_first = is_last
            if is_last:
                state.complete()
            state.count(is_last)
        return first, last

    @parameterized.parameters(False, True)
    def test_counts_as_the_variables_do(self, asks):
        state = at_start(3)
        self.assertEqual(self.counted(state, 8, asks), ([0, 3, 6], [2, 5]))
        self.assertEqual(state.read(), (2, 3))
        state.write()
        self.assertEqual(state.variable, 2)
        self.assertEqual(state.completed, 2)
        self.assertEqual(run(state, 5), [0, 3])
        self.assertEqual(self.counted(state, 3, asks), ([2], [1]))

    def test_change_waits_for_the_next_window(self):
        state = at_start(3)
        self.counted(state, 2)
        state.set_options(options.Options(accum_steps=2))
        self.assertEqual(self.counted(state, 5), ([1, 3], [0, 2, 4]))

    def test_what_fails_is_not_counted(self):
        state = at_start(2)
        self.assertFalse(state.next_is_last())
        self.assertFalse(state.next_is_last())
        self.counted(state, 1)
        state.move_to(0)
        self.assertFalse(state.next_is_last())


if __name__ == "__main__":
    tf.test.main()
