"""State that is assigned once a window."""

import keras
import numpy as np
import tensorflow as tf

from keras_accum import microbatch
from keras_accum import repeated_state
from tests import test_utils


class RepeatedStateTest(test_utils.TestCase):
    def make(self, value=1.0):
        model = keras.Model()
        variable = keras.Variable(value, trainable=False)
        part = repeated_state.RepeatedState(model)
        part.begin_with([variable])
        return model, variable, part

    def test_each_microbatch_begins_as_the_window(self):
        for as_tensor in (False, True):
            model, variable, part = self.make()
            for is_first in (True, False, False, True, False):
                first = (
                    (lambda is_first=is_first: tf.constant(is_first))
                    if as_tensor
                    else is_first
                )
                part.start(microbatch.Microbatch(model, first))
                variable.assign(2 * variable)
            # Two windows.
            self.assertAllEqual(variable, 4.0)

    def test_goes_on_from_a_checkpoint(self):
        model, variable, part = self.make()
        part.start(microbatch.Microbatch(model, True))
        variable.assign(7.0)
        state = part.state()
        model, variable, part = self.make(7.0)
        part.restore(state)
        part.start(microbatch.Microbatch(model, False))
        self.assertAllEqual(variable, 1.0)
        # Or before the variables are known.
        model, variable, part = self.make(7.0)
        early = repeated_state.RepeatedState(model)
        early.restore(state)
        np.testing.assert_equal(early.state(), state)
        early.begin_with([variable])
        early.start(microbatch.Microbatch(model, False))
        self.assertAllEqual(variable, 1.0)


if __name__ == "__main__":
    tf.test.main()
