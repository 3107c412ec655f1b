"""Tests of windows that follow the gradient noise scale."""

import math
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_accum import schedules
from tests import test_utils
from tests.noise_cases import Sizes
from tests.noise_cases import model_of


def sizes_of(schedule, intervals, size=0, **kwargs):
    """Returns the windows that a schedule makes, one after the other."""
    sizes = []
    for updates, (low, high) in enumerate(intervals):
        size = schedule(updates, low, high, size, **kwargs)
        sizes.append(size)
    return sizes


UNKNOWN = (math.nan, math.nan)


class ScheduleTest(tf.test.TestCase):
    def test_begins_with_the_smallest(self):
        schedule = schedules.NoiseScale(4, 64)
        self.assertEqual(schedule(0), 4)
        self.assertEqual(sizes_of(schedule, [UNKNOWN] * 3), [4] * 3)

    def test_doubles_and_halves_at_most(self):
        schedule = schedules.NoiseScale(2, 64)
        intervals = [(50.0, 90.0)] * 7 + [(1.0, 3.0)] * 5
        expected = [4, 8, 16, 32, 50, 50, 50, 25, 12, 6, 3, 3]
        self.assertEqual(sizes_of(schedule, intervals), expected)

    def test_is_within_its_bounds(self):
        schedule = schedules.NoiseScale(3, 10)
        far = [(math.inf, math.inf)] * 3
        self.assertEqual(sizes_of(schedule, far), [6, 10, 10])
        near = [(0.0, 0.0)] * 3
        self.assertEqual(sizes_of(schedule, near, size=10), [5, 3, 3])

    def test_stays_while_it_may_be_right(self):
        schedule = schedules.NoiseScale(1, 64)
        intervals = [(9.0, 40.0), (15.0, 16.0), (0.0, math.inf), (9.0, 12.0)]
        found = sizes_of(schedule, intervals, size=16)
        self.assertEqual(found, [16] * 3 + [12])

    def test_ratio(self):
        schedule = schedules.NoiseScale(1, 64, ratio=0.5)
        found = sizes_of(schedule, [(32.0, 64.0)] * 3, size=8)
        self.assertEqual(found, [16] * 3)

    def test_one_micro_batch_tells_nothing(self):
        schedule = schedules.NoiseScale(1, 8)
        self.assertEqual(sizes_of(schedule, [UNKNOWN]), [2])
        sizes = sizes_of(schedule, [(0.4, 0.6)] * 17, size=1)
        self.assertEqual([i for i, k in enumerate(sizes) if k == 2], [0, 8, 16])
        two = sizes_of(schedule, [(0.4, 0.6)] * 9, size=1, num_replicas=2)
        self.assertEqual(two, [1] * 9)

    def test_rows(self):
        schedule = schedules.NoiseScale(50, 400)
        intervals = [UNKNOWN, *[(100.0, 200.0)] * 4]
        found = sizes_of(schedule, intervals, unit=16)
        # At least 50 rows, at most 400.
        self.assertEqual(found, [4, 8, 16, 25, 25])

    def test_configuration(self):
        schedule = schedules.NoiseScale(2, 64, ratio=0.5)
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(schedule)
        )
        self.assertEqual(again, schedule)
        self.assertNotEqual(schedules.NoiseScale(2, 64), schedule)
        self.assertEqual(hash(again), hash(schedule))
        self.assertEqual(
            repr(schedule), "NoiseScale(minimum=2, maximum=64, ratio=0.5)"
        )

    def test_errors(self):
        for arguments, error in (
            ((0, 4), ValueError),
            ((2.0, 4), TypeError),
            ((4, 2), ValueError),
            ((1, 4, 0.0), ValueError),
            ((1, 4, math.inf), ValueError),
            ((1, 4, "1"), TypeError),
            ((1, 4, True), TypeError),
        ):
            with self.subTest(arguments=arguments):
                with self.assertRaises(error):
                    schedules.NoiseScale(*arguments)


class FollowingTest(tf.test.TestCase):
    def fit(self, noise, batch_size=4, batches=600, strategy=None, **kwargs):
        model, x, y = model_of(noise, strategy, **kwargs)
        sizes, count = Sizes(), batches * batch_size
        model.fit(
            x[:count], y[:count], batch_size, verbose=0, callbacks=[sizes]
        )
        return model, sizes.windows

    def test_k_follows(self):
        # 64 rows are 16 micro-batches.
        model, windows = self.fit(8.0, accum_steps=schedules.NoiseScale(2, 64))
        self.assertEqual(windows[:7], [2] * 7)
        for before, after in zip(windows, windows[1:], strict=False):
            self.assertBetween(after, before / 2, before * 2)
        self.assertBetween(windows[-1], 8, 32)
        self.assertIsInstance(model.accum_steps, schedules.NoiseScale)

    @pytest.mark.thorough
    def test_rows_of_an_update_follow(self):
        _, windows = self.fit(
            8.0, effective_batch_size=schedules.NoiseScale(8, 256)
        )
        self.assertEqual(windows[:7], [2] * 7)
        self.assertBetween(windows[-1], 8, 32)

    @pytest.mark.thorough
    def test_one_micro_batch_is_enough(self):
        _, windows = self.fit(
            1.0,
            batch_size=8,
            batches=200,
            accum_steps=schedules.NoiseScale(1, 8),
        )
        self.assertBetween(np.mean(windows[20:]), 1.0, 1.3)
        self.assertIn(2, windows[20:])

    def test_nothing_is_traced_again(self):
        cls, counted = test_utils.counting_traces()
        inputs = keras.Input((1,))
        outputs = keras.layers.Dense(1)(inputs)
        model = cls(inputs, outputs, accum_steps=schedules.NoiseScale(2, 64))
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
        _, x, y = model_of(8.0)
        model.fit(x[:64], y[:64], 4, verbose=0)
        before = len(counted)
        model.fit(x[:1200], y[:1200], 4, verbose=0)
        self.assertEqual(len(counted), before)

    def test_goes_on_where_it_was(self):
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model, windows = self.fit(8.0, accum_steps=schedules.NoiseScale(2, 64))
        model.save(path)
        again = keras.saving.load_model(path)
        _, x, y = model_of(8.0)
        sizes = Sizes()
        again.fit(x[:400], y[:400], 4, verbose=0, callbacks=[sizes])
        self.assertBetween(sizes.windows[0], windows[-1] / 2, windows[-1] * 2)

    @pytest.mark.thorough
    def test_replicas_agree(self):
        strategy = test_utils.chosen_strategy()[0]
        _, windows = self.fit(
            8.0, strategy=strategy, accum_steps=schedules.NoiseScale(1, 64)
        )
        self.assertEqual(windows[:7], [1] * 7)
        self.assertBetween(windows[-1], 8, 32)

    @pytest.mark.thorough
    def test_steps_per_execution(self):
        model, x, y = model_of(8.0, accum_steps=schedules.NoiseScale(2, 64))
        model.compile(
            keras.optimizers.SGD(0.0),
            "mse",
            steps_per_execution=4,
            jit_compile=False,
        )
        model.fit(x[:2400], y[:2400], 4, verbose=0)
        updates = int(model.optimizer.iterations.numpy())
        self.assertBetween(updates, 40, 120)


if __name__ == "__main__":
    tf.test.main()
