"""What is known of a CPU's memory, and what follows for a step."""

import pathlib
import platform
import unittest

import pytest
import tensorflow as tf

from keras_accum import memory
from keras_accum import system_memory
from tests import test_utils

# Prints how much the address space grows by threads that take a little memory.
THREADS = """
import ctypes, threading
import keras_accum
from keras_accum import system_memory

allocate, barrier = ctypes.CDLL(None).malloc, threading.Barrier(9)

def work():
    allocate(1000)
    barrier.wait()

threading.stack_size(2**20)
before = system_memory.address_space()
for _ in range(8):
    threading.Thread(target=work).start()
barrier.wait()
print(system_memory.address_space() - before)
"""


class MemoryTest(tf.test.TestCase):
    def test_takes_a_line_through_what_was_measured(self):
        measured = {4: 400, 16: 1000}
        # 50 for each of the rows beyond 16, and the unevenness.
        unevenness = memory.UNEVENNESS
        self.assertEqual(
            memory.bytes_for(measured, 32), int(1000 + unevenness * 800)
        )
        self.assertEqual(memory.bytes_for(measured, 16), 1000)
        self.assertEqual(memory.bytes_for(measured, 8), 600)
        self.assertEqual(
            memory.bytes_for({4: 400}, 8), int(400 + unevenness * 400)
        )

    def test_largest(self):
        for limit, expected in ((100, 64), (63, 60), (23, 22), (5, 5), (0, 0)):
            self.assertEqual(
                memory.largest(64, lambda n, most=limit: n <= most), expected
            )

    def test_a_region_is_a_power_of_two_or_nine_tenths_of_that(self):
        if not memory.keeps_regions():
            self.skipTest("TensorFlow's allocator keeps no regions here.")
        gibibyte = 2**30
        # Larger than what any other test of the process has asked for.
        for needed, expected in (
            (64 * gibibyte, 64 * gibibyte),
            (63 * gibibyte, 64 * gibibyte),
            (57 * gibibyte, int(0.9 * 64 * gibibyte)),
            (50 * gibibyte, int(0.9 * int(0.9 * 64 * gibibyte))),
        ):
            self.assertEqual(memory.region_for(needed), expected)
        # What was larger before has made the power unknown.
        with tf.device("CPU:0"):
            mebibyte = tf.zeros((2**18,))
        self.assertEqual(memory.region_for(2**20), int(2**20 / 0.9))
        del mebibyte

    def test_reads_what_linux_says(self):
        folder = pathlib.Path(self.get_temp_dir())
        for name, text in (
            ("memory.max", "1000\n"),
            ("memory.current", "700\n"),
            ("memory.stat", "anon 500\ninactive_file 150\nactive_file 50\n"),
        ):
            folder.joinpath(name).write_text(text, encoding="utf-8")
        self.assertEqual(system_memory.room_of_group(folder), 450)
        folder.joinpath("memory.max").write_text("max\n", encoding="utf-8")
        with self.assertRaises(ValueError):
            system_memory.room_of_group(folder)
        self.assertGreater(system_memory.free_bytes(), 0)

    @unittest.skipUnless(
        platform.libc_ver()[0] == "glibc", "Others have no heaps for threads."
    )
    @pytest.mark.thorough
    def test_threads_get_no_heaps_where_addresses_are_limited(self):
        def grown(before):
            run = test_utils.run_program("-c", THREADS, before=before)
            self.assertEqual(run.returncode, 0, run.stderr)
            return int(run.stdout)

        self.assertLess(grown(test_utils.LIMITED), 64 * 2**20)
        # Without a limit, nothing is changed.
        self.assertGreater(grown(()), 4 * 64 * 2**20)


if __name__ == "__main__":
    tf.test.main()
