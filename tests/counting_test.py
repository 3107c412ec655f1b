"""What a call takes, as TensorFlow or the system counts it."""

import unittest

import numpy as np
import tensorflow as tf

from keras_accum import counting
from keras_accum import system_memory

MIB = 2**20


class CountingTest(tf.test.TestCase):
    def test_the_most_that_was_there_at_once(self):
        if not counting.counts("CPU:0"):
            self.skipTest("Nobody counts here.")

        def take():
            for _ in range(3):
                tf.ones((2, 16 * MIB))[1, 1].numpy()

        take()
        found = counting.counted_bytes(take) / MIB
        self.assertBetween(found, 127, 1.1 * 128)

    def test_another_device(self):
        calls = []
        found = counting.counted_bytes(calls.append, 1, device="TPU:0")
        self.assertEqual((found, calls), (0, [1]))


@unittest.skipUnless(system_memory.tells_peaks(), "It needs Linux.")
class PeakTest(tf.test.TestCase):
    def test_peak(self):
        kept = np.ones((8 * MIB,))
        system_memory.forget_peak()
        before = system_memory.resident_bytes()
        del kept
        np.ones((16 * MIB,))
        found = (system_memory.peak_bytes() - before) / MIB
        self.assertBetween(found, 60, 72)

    def test_what_was_free_counts(self):
        # In pieces that the C library keeps.
        pieces = [bytearray(64 * 1024) for _ in range(1024)]
        end = bytearray(64 * 1024)
        del pieces
        system_memory.forget_peak()
        before = system_memory.resident_bytes()
        pieces = [bytearray(64 * 1024) for _ in range(1024)]
        found = (system_memory.peak_bytes() - before) / MIB
        self.assertBetween(found, 60, 72)
        del pieces, end


if __name__ == "__main__":
    tf.test.main()
