"""The gradients of a window."""

import tensorflow as tf

from keras_accum import calls
from keras_accum import microbatch
from keras_accum import options
from keras_accum import window_gradients
from tests import test_utils


class GradientsTest(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        self.model = test_utils.mlp()
        self.model.compile("sgd")
        self.part = window_gradients.Gradients(self.model, options.Options())

    def gradients(self, value):
        return [tf.fill(v.shape, value) for v in self.model.trainable_weights]

    def microbatch(self, value, weight, first):
        made = microbatch.Microbatch(self.model, first)
        call = calls.make_call(
            self.model, self.gradients(value), weight, None, None
        )
        made.record(call, place=())
        return made

    def test_counts_and_divides(self):
        self.assertEqual(self.part.num_microbatches, 0)
        self.assertEmpty(self.part.variables)
        accumulator = self.part.make_accumulator()
        self.assertAllEqual(self.part.is_empty(), True)
        self.part.add(self.microbatch(1.0, 1.0, True))
        self.part.add(self.microbatch(5.0, 3.0, False))
        self.assertIs(self.part.make_accumulator(), accumulator)
        self.assertEqual(self.part.num_microbatches, 2)
        self.assertLen(self.part.variables, 4)
        (update,) = self.part.updates(self.part.sums())
        self.assertIs(update.optimizer, self.model.optimizer)
        self.assertIsNone(update.is_made)
        for mean in update.gradients:
            self.assertAllClose(mean, tf.fill(mean.shape, 4.0))
        state = self.part.state()
        self.part.close(None, None)
        self.assertEqual(self.part.num_microbatches, 0)
        self.part.restore(state)
        self.assertEqual(self.part.num_microbatches, 2)

    def test_other_variables_have_another_accumulator(self):
        before = self.part.make_accumulator()
        self.assertIs(self.part.make_accumulator(), before)
        self.model.layers[1].trainable = False
        self.assertLen(self.part.make_accumulator().variables, 2)
        with self.assertRaisesRegex(ValueError, "as many variables"):
            self.part.check_state(before.state())

    def test_saving_changes_nothing(self):
        accumulator = self.part.make_accumulator()
        accumulator.add(self.gradients(1.0), 1.0, True)
        self.model.layers[1].trainable = False
        self.assertLen(self.part.state(), 3 + 4)
        self.assertIs(self.part.accumulator, accumulator)

    def test_reset_needs_nothing(self):
        self.part.reset()
        self.assertIsNone(self.part.accumulator)


if __name__ == "__main__":
    tf.test.main()
