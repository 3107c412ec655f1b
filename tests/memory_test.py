"""What is known of a CPU's memory, and what follows for a step."""

import ctypes
import pathlib
import platform
import unittest

import pytest
import tensorflow as tf

from keras_accum import compat
from keras_accum import memory
from keras_accum import reserve
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

# Prints how much is idle once most of many blocks are freed.
IDLE = """
import keras_accum
from keras_accum import heap

before = heap.idle_bytes()
blocks = [bytearray(100_000) for _ in range(1000)]
end = bytearray(100_000)
del blocks
print(heap.idle_bytes() - before)
"""


# Prints how many addresses a block takes for which the heap has kept some, once
# a data set was of a generator.
KEPT = """
import ctypes
import tensorflow as tf
from keras_accum import heap
from keras_accum import system_memory

signature = tf.TensorSpec((), tf.int32)
list(tf.data.Dataset.from_generator(lambda: [1], output_signature=signature))
gaps = [bytearray(2**20) for _ in range(64)]
del gaps[::2]
with heap.kept(48 * 2**20):
    before = system_memory.address_space()
    allocate = ctypes.CDLL(None).malloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    assert allocate(48 * 2**20)
    print(system_memory.address_space() - before)
"""

# Prints how many addresses tensors and the gaps between them take, once that
# much was got, in parts. Some of it has gaps that are too small for tensors.
RESERVED = """
import resource
import tensorflow as tf
from keras_accum import reserve
from keras_accum import system_memory

mebibyte = 2**20
tf.zeros(())
limit = system_memory.address_space() + 1500 * mebibyte
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
got = reserve.Reserve()
got.grow(100 * mebibyte, limit)
others = [tf.zeros((3 * 2**18,)) for _ in range(30)]
del others[::2]
for needed in 300, 340, 390:
    got.grow(needed * mebibyte, limit)
before = system_memory.address_space()
count = int(reserve.OVERSHOOT * needed / 4)
tensors = [tf.zeros((2**20,)) for _ in range(count)]
print(system_memory.address_space() - before)
"""

# Prints how many rows are found to have room once nothing but them is free.
FULL = """
import resource
import tensorflow as tf
from keras_accum import compat
from keras_accum import memory
from keras_accum import reserve
from keras_accum import system_memory

tf.zeros(())
asked = []

def needed(data, rows):
    asked.append(rows)
    return compat.MemoryPlan(rows * 2**20, 0)

planned = memory.Planned(needed, reserve.Reserve(), 2**20, lambda: 0)
assert planned.most_rows(None, 64, 0) == 64
limit = system_memory.address_space() + 32 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(planned.most_rows(None, 128, 0))
assert asked == [64]
"""

# Prints the most addresses that compiled steps of a convolution take, in
# percent of what they are said to take.
CONVOLUTION = """
import threading
import tensorflow as tf
from keras_accum import compat
from keras_accum import system_memory

@tf.function(jit_compile=True)
def step(x, kernel):
    return tf.nn.conv2d(x, kernel, 1, "SAME")

def watch():
    while not is_done.is_set():
        most.append(max(most.pop(), system_memory.address_space()))

batch = tf.zeros((64, 32, 32, 32)), tf.zeros((3, 3, 32, 64))
step(*batch)
is_done, most = threading.Event(), [0]
thread = threading.Thread(target=watch)
thread.start()
before = system_memory.address_space()
for _ in range(20):
    step(*batch)
is_done.set()
thread.join()
print(100 * (most[0] - before) // compat.memory_plan(step, *batch).mapped)
"""

needs_regions = unittest.skipUnless(
    reserve.keeps_regions(), "TensorFlow's allocator keeps no regions here."
)


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
        self.assertEqual(memory.bytes_for({1: 400, 2: 390}, 8), 390)
        # On the line between the two that are closest, and below all of them.
        measured = {4: 400, 16: 1000, 32: 1200, 64: 1300}
        self.assertEqual(memory.bytes_for(measured, 24), 1100)
        self.assertEqual(memory.bytes_for(measured, 2), 370)
        # Not less than their part of the fewest, nor than nothing.
        self.assertEqual(memory.bytes_for({4: 100, 8: 1000}, 2), 50)

    def test_finds_most_rows_of_a_step_that_takes_much_for_all(self):
        """As one does whose model has large weights."""
        free = system_memory.free_bytes()
        for fixed, rows in ((0.3, 64), (0.3, 4096), (0.1, 4096)):
            per_row, asked = int(0.8 * free / 4096), []

            def needed(data, rows, counted=None):
                asked.append(rows)  # noqa: B023
                return int(fixed * free) + rows * per_row  # noqa: B023

            def plan(*args):
                return compat.MemoryPlan(needed(*args), 0)  # noqa: B023

            counted = memory.Counted(needed, reserve.Reserve(), 0)
            planned = memory.Planned(plan, reserve.Reserve(), 0, lambda: 0)
            for forecast in counted, planned:
                found = forecast.most_rows(None, rows, 0)
                # What is free changes: others run on the machine.
                most = max(free, system_memory.free_bytes())
                expected = min(rows, (most - int(fixed * free)) / per_row)
                self.assertBetween(found, 0.4 * expected, expected)
                self.assertLessEqual(len(asked), 8)
                asked.clear()

    def test_finds_few_rows_where_more_take_much_for_all(self):
        """XLA needs no gradient by itself if there is one row."""
        free, asked = system_memory.free_bytes(), []

        def needed(data, rows):
            asked.append(rows)
            most = 2 * free + rows * 2**10 if rows > 3 else rows
            return compat.MemoryPlan(most, 0)

        planned = memory.Planned(needed, reserve.Reserve(), 0, lambda: 0)
        self.assertEqual(planned.most_rows(None, 512, 0), 3)
        self.assertLessEqual(len(asked), 8)

    def test_gradients_may_hide_what_rows_need(self):
        """Few rows then need no more than one, and many need more."""
        free, asked = system_memory.free_bytes(), []
        for hidden in (3, 20, 150, 700):
            per_row = free // 1000

            def needed(data, rows, counted=None):
                asked.append(rows)  # noqa: B023
                return max(hidden, rows) * per_row  # noqa: B023

            counted = memory.Counted(needed, reserve.Reserve(), 0)
            found = counted.most_rows(None, 4096, 0)
            # No step on trial takes all that there is.
            self.assertLess(max(asked), 900)
            self.assertBetween(found, 0 if hidden == 700 else 200, 800)
            self.assertLessEqual(len(asked), memory.TRIALS)
            asked.clear()

    @pytest.mark.thorough
    def test_convolutions_take_addresses_that_xla_does_not_plan(self):
        self.assertBetween(test_utils.number_printed(CONVOLUTION), 90, 110)

    def test_leaves_room_to_save(self):
        free = system_memory.free_bytes()
        found = []
        # The last is more than there is, however few the rows.
        for saving in (0.0, 0.5, 2.0):

            def needed(data, rows, counted=None):
                return rows * free // 1000

            def plan(data, rows):
                return compat.MemoryPlan(needed(data, rows), 0)

            for cls, need, *others in (
                (memory.Counted, needed),
                (memory.Planned, plan, lambda: 0),
            ):
                forecast = cls(
                    need, reserve.Reserve(), int(saving * free), *others
                )
                found.append(forecast.most_rows(None, 1000, 0))
        self.assertBetween(found[2], 0.3 * found[0], 0.7 * found[0])
        self.assertBetween(found[3], 0.3 * found[1], 0.7 * found[1])
        self.assertAllClose(found[4:], found[:2], rtol=0.2)

    def test_largest(self):
        for limit, expected in ((100, 64), (63, 60), (23, 22), (5, 5), (0, 0)):
            self.assertEqual(
                memory.largest(64, lambda n, most=limit: n <= most), expected
            )

    @needs_regions
    def test_a_region_is_a_power_of_two_or_nine_tenths_of_that(self):
        gibibyte = 2**30
        # Larger than what any other test of the process has asked for.
        for needed, expected in (
            (64 * gibibyte, 64 * gibibyte),
            (63 * gibibyte, 64 * gibibyte),
            (57 * gibibyte, int(0.9 * 64 * gibibyte)),
            (50 * gibibyte, int(0.9 * int(0.9 * 64 * gibibyte))),
        ):
            self.assertEqual(reserve.region_for(needed), expected)
        # What was larger before has made the power unknown.
        with tf.device("CPU:0"):
            mebibyte = tf.zeros((2**18,))
        self.assertEqual(reserve.region_for(2**20), int(2**20 / 0.9))
        del mebibyte

    def test_reads_the_limits_of_control_groups(self):
        """In files that are made, as no machine has them in all these ways."""
        folder = pathlib.Path(self.get_temp_dir())

        def write(name, text):
            folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            folder.joinpath(name).write_text(text, encoding="utf-8")

        def write_group(name, names, limit, used, statistics):
            for each, text in zip(
                (*names, "memory.stat"), (limit, used, statistics), strict=True
            ):
                write(f"{name}/{each}", f"{text}\n")

        def check(groups, root, top, kind, expected):
            write("cgroup", groups)
            write(
                "mountinfo",
                "23 1 8:1 / / rw - ext4 /dev/vda rw\n"
                "30 23 0:28 / /sys/cpu rw - cgroup cgroup rw,cpu\n"
                f"31 23 0:29 {root} {folder}/{top} rw shared:9 - {kind} rw\n",
            )
            self.assertEqual(system_memory.room_of_groups(folder), expected)

        second = ("memory.max", "memory.current")
        none = "inactive_file 0\nactive_file 0"
        some = "anon 7\ninactive_file 150\nactive_anon 9\nactive_file 80"
        write_group("two", second, "max", 9000, none)
        write_group("two/job", second, 1000, 800, some)
        write_group("two/job/step", second, "max", 500, none)
        own = "0::/job/step\n"
        # The limit is that of the parent.
        check(own, "/", "two", "cgroup2 cgroup2", 390)
        # A container that sees the whole tree has its group alone mounted.
        check("0::/pod/job\n", "/pod/job", "two/job", "cgroup2 none", 390)
        # One that is shown its group as if it were all.
        check("0::/\n", "/", "two/job", "cgroup2 cgroup", 390)
        # Paths out of what it sees.
        check("0::/../other\n", "/", "two/job", "cgroup2 cgroup", 390)

        first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        statistics = (
            "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 60"
        )
        write_group("one", first, 2**63 - 4096, 9000, statistics)
        write_group("one/job", first, 1000, 700, statistics)
        groups = "9:name=systemd:/\n4:memory,hugetlb:/job\n3:cpu:/no\n0::/\n"
        check(groups, "/", "one", "cgroup cgroup rw,memory,hugetlb", 350)

        write_group("two/job", second, "max", 800, none)
        with self.assertRaises(ValueError):
            check(own, "/", "two", "cgroup2 cgroup2", None)
        self.assertGreater(system_memory.free_bytes(), 0)

    @pytest.mark.thorough
    def test_a_control_group_limits_what_is_free(self):
        limit = 2 * 2**30
        with test_utils.memory_group(limit) as before:
            free = test_utils.number_printed(
                "import keras_accum.system_memory as system\n"
                "print(system.free_bytes())",
                before,
            )
        self.assertBetween(free, limit // 2, limit)

    @unittest.skipUnless(
        platform.libc_ver()[0] == "glibc"
        and hasattr(ctypes.CDLL(None), "mallinfo2"),
        "The C library does not say.",
    )
    @pytest.mark.thorough
    def test_knows_what_the_heap_has(self):
        for before, expected in ((test_utils.LIMITED, 10**8), ((), 0)):
            idle = test_utils.number_printed(IDLE, before)
            self.assertBetween(idle, 0.8 * expected, 1.2 * expected)

    @unittest.skipUnless(
        platform.libc_ver()[0] == "glibc", "Others have other heaps."
    )
    @pytest.mark.thorough
    def test_keeps_one_block_of_the_heap(self):
        taken = test_utils.number_printed(KEPT, test_utils.LIMITED)
        self.assertEqual(taken, 0)

    @needs_regions
    @pytest.mark.thorough
    def test_gets_room_for_gaps_each_time(self):
        taken = test_utils.number_printed(RESERVED, test_utils.LIMITED)
        self.assertEqual(taken, 0)

    @needs_regions
    @pytest.mark.thorough
    def test_what_was_got_has_room_where_nothing_is_free(self):
        rows = test_utils.number_printed(FULL, test_utils.LIMITED)
        self.assertEqual(rows, 64)

    @unittest.skipUnless(
        platform.libc_ver()[0] == "glibc", "Others have no heaps for threads."
    )
    @pytest.mark.thorough
    def test_threads_get_no_heaps_where_addresses_are_limited(self):
        grown = test_utils.number_printed(THREADS, test_utils.LIMITED)
        self.assertLess(grown, 64 * 2**20)
        # Without a limit, nothing is changed.
        grown = test_utils.number_printed(THREADS)
        self.assertGreater(grown, 4 * 64 * 2**20)


if __name__ == "__main__":
    tf.test.main()
