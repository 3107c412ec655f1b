"""Tests of the arithmetic of the gradient noise scale."""

import math

import numpy as np
import tensorflow as tf

from keras_accum import noise_scale

UNEVEN = [60, 60, 60, 1, 60, 9, 60, 30]


def windows(number, sizes=UNEVEN, seed=0):
    """Yields tr S and |G|^2 of windows, of rows with a known noise scale.

    A row's gradient is (1, 0, 0, ...) plus noise in 40 entries of variance 3:
    the noise scale is 120 rows.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array(sizes, float)
    for _ in range(number):
        noise = rng.normal(size=(len(sizes), 40)) * np.sqrt(3 / sizes)[:, None]
        noise[:, 0] += 1
        mean = sizes @ noise / sizes.sum()
        yield noise_scale.of_window(
            sizes @ (noise**2).sum(1), mean @ mean, sizes.sum(), len(sizes)
        )


def moments_of(number, **kwargs):
    state = tf.constant(noise_scale.no_windows())
    for trace, norm in windows(number, **kwargs):
        state = noise_scale.advanced(
            state, trace, norm, sum(UNEVEN), sum(UNEVEN) / len(UNEVEN)
        )
    return state


class NoiseScaleTest(tf.test.TestCase):
    def test_is_unbiased_for_uneven_micro_batches(self):
        trace, norm = np.mean(list(windows(2000)), axis=0)
        self.assertAllClose(trace, 120.0, rtol=0.01)
        self.assertAllClose(norm, 1.0, rtol=0.01)

    def test_interval_holds_the_truth(self):
        held = 0
        for seed in range(40):
            found = noise_scale.estimate(moments_of(60, seed=seed))
            self.assertBetween(float(found.value), found.low, found.high)
            held += bool(found.low < 120.0 < found.high)
        # 95 %, give or take.
        self.assertBetween(held, 35, 40)

    def test_interval_narrows(self):
        few, many = (
            noise_scale.estimate(moments_of(number)) for number in (10, 160)
        )
        ratio = (few.high - few.low) / (many.high - many.low)
        # The moving mean is over some 130 of 160 windows.
        self.assertBetween(ratio, 2.0, 6.0)

    def test_of_one_window_it_has_no_end(self):
        found = noise_scale.estimate(moments_of(1))
        self.assertEqual((float(found.low), float(found.high)), (0.0, math.inf))

    def test_of_none_nothing_is_known(self):
        found = noise_scale.estimate(tf.constant(noise_scale.no_windows()))
        self.assertTrue(all(map(np.isnan, found)))

    def test_a_gradient_lost_in_noise(self):
        state = tf.constant(noise_scale.no_windows())
        for norm in (1.0, -1.0) * 10:
            state = noise_scale.advanced(state, 100.0, norm, 10.0, 1.0)
        found = noise_scale.estimate(state)
        self.assertEqual(found.high, math.inf)
        self.assertGreater(found.low, 50.0)

    def test_in_steps(self):
        state = moments_of(8)
        rows = noise_scale.estimate(state)
        steps = noise_scale.in_steps(state, 8)
        size = sum(UNEVEN) / len(UNEVEN)
        self.assertAllClose(steps, [rows.low / size, rows.high / size])
        unknown = noise_scale.in_steps(state, 9)
        self.assertTrue(np.isnan(unknown).all())

    def test_enough(self):
        # As many updates again as with batches without end, and a tenth more.
        self.assertAllClose(noise_scale.enough(1e9, 100.0), 1000.0, rtol=1e-5)
        size = noise_scale.enough(1000.0, 100.0)
        self.assertAllClose((1 + 100 / size) / (1 + 100 / 1000), 1.1)


if __name__ == "__main__":
    tf.test.main()
