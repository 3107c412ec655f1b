"""The window's arithmetic, and the checks of `accum_steps`."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import window
from tests import test_utils


def run(state, microbatches):
    """Positions at which the window was full."""
    full = []
    for index in range(microbatches):
        if int(state.position) == 0:
            state.begin(state.completed)
        if state.advance():
            full.append(index)
            state.complete()
    return full


class WindowTest(test_utils.TestCase):
    def test_ends_every_k(self):
        state = window.Window(3)
        self.assertEqual(run(state, 10), [2, 5, 8])
        self.assertEqual(state.position, 1)
        self.assertEqual(state.completed, 3)

    def test_change_waits_for_the_next_window(self):
        state = window.Window(3)
        self.assertEqual(run(state, 2), [])
        state.accum_steps = 2
        self.assertEqual(run(state, 5), [0, 2, 4])

    def test_function_gets_ints_once_a_window(self):
        seen = []

        def schedule(updates):
            self.assertIs(type(updates), int)
            seen.append(updates)
            return updates + 1

        state = window.Window(schedule)
        self.assertEqual(run(state, 7), [0, 2, 5])
        self.assertEqual(seen, [0, 1, 2, 3])


class CountingTest(test_utils.TestCase, parameterized.TestCase):
    def counted(self, state, microbatches, asks=False):
        """Positions of first and last micro-batches, counted in Python."""
        first, last = [], []
        for index in range(microbatches):
            place = state.place()
            if asks:
                self.assertEqual(int(state.position) == 0, place.is_first)
            first += [index] * place.is_first
            last += [index] * place.is_last
            if place.is_last:
                state.complete()
            state.count(place)
        return first, last

    @parameterized.parameters(False, True)
    def test_counts_as_the_variables_do(self, asks):
        state = window.Window(3)
        self.assertEqual(self.counted(state, 8, asks), ([0, 3, 6], [2, 5]))
        self.assertEqual(state.position, 2)
        self.assertEqual(state.size, 3)
        self.assertEqual(state.completed, 2)
        self.assertEqual(run(state, 5), [0, 3])
        self.assertEqual(self.counted(state, 3, asks), ([2], [1]))

    def test_change_waits_for_the_next_window(self):
        state = window.Window(3)
        self.counted(state, 2)
        state.accum_steps = 2
        self.assertEqual(self.counted(state, 5), ([1, 3], [0, 2, 4]))

    def test_what_fails_is_not_counted(self):
        state = window.Window(2)
        self.assertTrue(state.place().is_first)
        self.assertTrue(state.place().is_first)
        self.counted(state, 1)
        state.rewind()
        self.assertTrue(state.place().is_first)


class ErrorTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(0, -1, np.int64(0))
    def test_not_positive(self, value):
        with self.assertRaisesRegex(
            ValueError, f"`accum_steps` must be a positive .*{value}"
        ):
            window.Window(value)

    @parameterized.parameters(2.5, 2.0, True, "8", None, ([8],))
    def test_not_an_int(self, value):
        with self.assertRaisesRegex(
            TypeError, "`accum_steps` must be a positive .*of type"
        ):
            window.Window(value)

    def test_numpy_ints_are_ints(self):
        self.assertEqual(run(window.Window(np.int32(2)), 4), [1, 3])

    def test_policy(self):
        with self.assertRaisesRegex(
            ValueError, "`partial_window` must be one of \"flush\".*'keep'"
        ):
            window.check_partial_window("keep")


if __name__ == "__main__":
    tf.test.main()
