"""How many rows make a micro-batch."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import microbatch_size
from tests import test_utils


class SizeTest(tf.test.TestCase):
    def test_given(self):
        size = microbatch_size.MicrobatchSize(4)
        self.assertEqual((size.value, size.rows, size.is_auto), (4, 4, False))
        self.assertIsNone(microbatch_size.MicrobatchSize(None).rows)

    def test_found(self):
        size = microbatch_size.MicrobatchSize("auto")
        self.assertTrue(size.is_auto)
        self.assertIsNone(size.rows)
        self.assertEqual(size.to_try(16), 16)
        with self.assertLogs("absl", "WARNING"):
            self.assertTrue(size.record_fit(8))
        self.assertEqual(size.value, 8)
        # A short batch says nothing of longer ones.
        self.assertFalse(size.record_fit(3))
        self.assertTrue(size.record_fit(12))
        # A failure leaves a limit, which is kept.
        size.limit = 5
        self.assertEqual(size.to_try(16), 5)
        self.assertTrue(size.record_fit(5))
        self.assertEqual((size.value, size.to_try(3)), (5, 3))


class StatefulTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (lambda: keras.layers.LSTM(2, stateful=True),),
        (
            lambda: keras.layers.Bidirectional(
                keras.layers.GRU(2, stateful=True)
            ),
        ),
        (
            lambda: keras.Sequential(
                [keras.layers.RNN(keras.layers.SimpleRNNCell(2), stateful=True)]
            ),
        ),
    )
    def test_rows_do_not_follow_each_other(self, make):
        inputs = keras.Input(batch_shape=(4, 3, 2))
        outputs = keras.layers.Dense(1)(make()(inputs))
        x, y = np.ones((4, 3, 2)), np.ones((4, 1))
        for size in (2, "auto"):
            model = keras_accum.GradientAccumulationModel(
                inputs, outputs, microbatch_size=size
            )
            model.compile("sgd", "mse")
            with self.assertRaisesRegex(ValueError, "Use `accum_steps`"):
                model.fit(x, y, verbose=0)
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, microbatch_size=2
        )
        model.compile("sgd", "mse")
        with self.assertRaisesRegex(ValueError, "`stateful`"):
            model.evaluate(x, y, verbose=0)
        with self.assertRaisesRegex(ValueError, "`stateful`"):
            model.predict(x, verbose=0)
        model.microbatch_size = None
        model.accum_steps = 2
        model.fit(np.tile(x, (2, 1, 1)), np.tile(y, (2, 1)), 4, verbose=0)
        model.accum_steps = 1
        with self.assertRaisesRegex(ValueError, "`stateful`"):
            model.microbatch_size = 2
        self.assertIsNone(model.microbatch_size)

    def test_others_are_let_through(self):
        model = keras.Sequential([keras.layers.LSTM(2), keras.layers.Dense(1)])
        microbatch_size.check_layers(model)


if __name__ == "__main__":
    tf.test.main()
