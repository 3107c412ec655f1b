"""Thousands of micro-batches: memory stays flat, nothing is traced again."""

import gc
import mmap
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import test_utils

ROUNDS, MICROBATCHES = (80, 250) if test_utils.IS_NIGHTLY else (40, 100)
# Programs, pools and caches are there after this many rounds.
WARM = 20
# The buffers, or the batches of two rounds, would be more.
FEATURES, ROWS = 700, 4
ALLOWED_MIB = 1.5
STATM = pathlib.Path("/proc/self/statm")


class CountedOptimizer(keras.optimizers.Adam):
    """Counts how often its update is traced."""

    traces = 0

    def apply(self, *args, **kwargs):
        type(self).traces += 1
        return super().apply(*args, **kwargs)


def resident_mib():
    """Returns the memory of this process, or None where it is not known."""
    if not STATM.exists():
        return None
    gc.collect()
    statm = STATM.read_text(encoding="utf-8")
    return int(statm.split()[1]) * mmap.PAGESIZE / 2**20


class SoakTest(test_utils.TestCase):
    @pytest.mark.long
    @test_utils.at_night
    def test_memory_and_traces(self):
        if not STATM.exists():
            self.skipTest("There is no /proc here.")
        sizes, traced = self.train(ROUNDS)
        self.assertEqual(set(traced[WARM:]), {traced[WARM]})
        half = WARM + (ROUNDS - WARM) // 2
        grown = np.median(sizes[half:]) - np.median(sizes[WARM:half])
        self.assertLess(grown, ALLOWED_MIB, sizes)

    def train(self, rounds):
        """Returns the memory and the number of traces after each round."""
        counted, traces = test_utils.counting_traces()
        keras.utils.set_random_seed(0)
        inputs = keras.Input((FEATURES,))
        outputs = keras.layers.Dense(FEATURES)(inputs)
        model = counted(inputs, outputs, accum_steps=2, partial_window="carry")
        model.compile(CountedOptimizer(1e-3), "mse")
        rng = np.random.default_rng(0)
        x = rng.normal(size=(MICROBATCHES * ROWS, FEATURES)).astype("float32")
        data = tf.data.Dataset.from_tensor_slices((x, x)).batch(ROWS)
        sizes, traced, updates = [], [], 0
        for index in range(rounds):
            accum_steps = int(rng.integers(1, 17))
            model.accum_steps = accum_steps
            model.fit(data, verbose=0)
            updates += MICROBATCHES // accum_steps
            rest = MICROBATCHES % accum_steps
            if index % 2:
                model.flush()
                updates += rest > 0
            else:
                model.reset_window()
            self.assertEqual(int(model.optimizer.iterations), updates)
            sizes.append(resident_mib())
            traced.append((len(traces), CountedOptimizer.traces))
        return sizes, traced


if __name__ == "__main__":
    tf.test.main()
