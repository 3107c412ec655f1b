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
        size.record_failure(12, 5)
        self.assertEqual(size.to_try(16), 5)
        with self.assertLogs("absl", "WARNING"):
            self.assertTrue(size.record_fit(5))
        self.assertEqual((size.value, size.to_try(3)), (5, 3))


class FastestTest(parameterized.TestCase):
    @parameterized.parameters(
        # Speeds of 32, 16 and 8 rows at once, in rows per second.
        ((100, 120, 90), 16),
        ((100, 104, 90), 32),
        ((100, 101, 130), 8),
    )
    def test_batches_take_turns(self, speeds, expected):
        size = microbatch_size.MicrobatchSize("auto")
        size.record_failure(64, 32)
        speeds, tried = dict(zip((32, 16, 8), speeds, strict=True)), []
        for batch in range(10):
            rows = 64 if batch != 3 else 20
            tried.append(size.to_try(rows))
            size.record_fit(tried[-1])
            # The first one of each size compiles.
            first = tried.count(tried[-1]) == 1
            seconds = rows / speeds.get(tried[-1], 1) + 100 * first
            size.record_time(tried[-1], rows, seconds)
        # A short batch says nothing of speed.
        self.assertEqual(tried[:7], [32, 32, 16, 20, 16, 8, 8])
        self.assertEqual(tried[7:], [expected] * 3)
        self.assertEqual(size.value, expected)

    def test_largest_is_near_what_fits(self):
        size, tried = microbatch_size.MicrobatchSize("largest"), []
        for _ in range(8):
            while True:
                tried.append(size.to_try(1024))
                if tried[-1] <= 300:
                    break
                size.record_failure(tried[-1], tried[-1] // 2)
            size.record_fit(tried[-1])
            self.assertFalse(size.record_time(tried[-1], 1024, 1.0))
        self.assertEqual(tried[:6], [1024, 512, 256, 384, 320, 288])
        self.assertBetween(size.value, 270, 300)
        self.assertEqual(tried[-1], size.value)
        self.assertLess(len({n for n in tried if n > 300}), 8)

    def test_a_longer_batch_that_fails_is_searched_again(self):
        size = microbatch_size.MicrobatchSize("auto")
        size.record_fit(8)
        size.record_time(8, 8, 1.0)
        size.record_failure(8, 4)
        self.assertEqual(size.to_try(8), 4)
        size.record_fit(4)
        self.assertEqual(size.value, 4)

    def test_keeps_the_fastest_so_far_where_there_is_no_room_to_time(self):
        for times, expected in (((), 64), ((1.0, 1.0, 4.0, 4.0), 64)):
            size = microbatch_size.MicrobatchSize("auto")
            size.record_fit(64)
            size.record_time(64, 64, 1.0)
            for seconds in times:
                size.record_time(size.to_try(64), 64, seconds)
            self.assertFalse(size.end_timing())
            self.assertFalse(size.is_timed(64))
            self.assertEqual(size.to_try(64), expected)
        size = microbatch_size.MicrobatchSize("auto")
        size.record_fit(64)
        for seconds in (1.0, 1.0, 0.5, 0.5):
            size.record_time(size.to_try(64), 64, seconds)
        self.assertTrue(size.end_timing())
        self.assertEqual(size.to_try(64), 32)


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
    @test_utils.first_command(1)
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
