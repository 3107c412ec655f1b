"""What a step will need of a CPU's memory, and how many rows there is room for.

A GPU that has no memory left says so, and nothing else happens. A CPU's
allocator says so as well; but then other threads, XLA's compiler and the
kernels' libraries ask for a little more, get nothing, and end the process. So a
CPU is not asked for what it is known not to have.

A compiled step says how much it needs: XLA plans that. Of one that is not
compiled, TensorFlow or Linux counts what it took. So steps on few rows come
first, and what those on more rows need follows from these: it is a fixed
amount, and an amount for each row.
"""

import contextlib
import mmap
from collections.abc import Callable
from collections.abc import Iterator

import tensorflow as tf

from keras_accum import compat
from keras_accum import counting
from keras_accum import system_memory

# What a forecast leaves free, for what is not counted: threads, their heaps,
# and the kernels' own libraries. `tests/auto_size_test.py` tries some limits.
MARGIN = 128 * 2**20
# What tracing the update takes at least.
TRACING = 16 * 2**20
# How close to the best number of rows is near enough.
NEARLY = 1.2
# What TensorFlow's allocator gets from the system, over what it is asked for,
# in regions; without them the C library does, for many tensors.
OVERSHOOT = 1.15
# Bytes of a tensor that stands for a part of what a step needs.
TENSOR = 4 * 2**20
# What compiling takes at least.
COMPILATION = 64 * 2**20
# How far peaks of more rows may lie above the line through peaks of few.
UNEVENNESS = 1.15
# Rows of one step on trial, over rows of the step before.
GROWTH = 4


class Room:
    """How many rows of batches there is room for, on a CPU.

    Args:
        needed: The bytes for a step, as for `Planned` if steps are compiled,
            else as for `Counted`.
        is_compiled: Whether they are.
    """

    def __init__(self, needed: Callable, is_compiled: bool) -> None:
        self._needed, self._is_compiled = needed, is_compiled
        self._reserve = Reserve()
        # By the shapes of batches.
        self._forecasts: dict[tuple, Forecast] = {}
        self._allowed: dict[tuple, int] = {}

    def most_rows(self, data, shapes: tuple, size: int, count: int) -> int:
        """Returns how many rows there is room for, but not more than `size`.

        Args:
            data: A batch.
            shapes: The shapes of its tensors, without the rows.
            size: Most rows of a step that are asked for.
            count: Bytes of the batch.

        Returns:
            A number from 0 to `size`.
        """
        # What was found to have room is not asked for again.
        if size <= most_allowed(self._allowed, shapes):
            return size
        if shapes not in self._forecasts:
            if system_memory.free_bytes() == system_memory.UNKNOWN:
                # Steps on trial would cost time, and be compared with nothing.
                return size
            forecast = Planned if self._is_compiled else Counted
            self._forecasts[shapes] = forecast(self._needed, self._reserve)
        # For the next batch, and a copy of it.
        rows = self._forecasts[shapes].most_rows(data, size, MARGIN + 2 * count)
        if system_memory.address_limit() is None:
            # Nothing ends the process, and memory may be had by swapping, or be
            # free again.
            rows = max(1, rows)
        self._allowed[shapes] = rows
        return rows


def most_allowed(allowed, shapes):
    """Returns the most rows allowed where rows are no shorter than these."""

    def are_shorter(others):
        return len(shapes) == len(others) and all(
            len(shape) == len(other)
            and all(
                a is not None and a <= b
                for a, b in zip(shape, other, strict=True)
            )
            for shape, other in zip(shapes, others, strict=True)
        )

    return max((n for s, n in allowed.items() if are_shorter(s)), default=0)


class Forecast:
    """What steps on a number of rows need, for batches of one shape.

    Args:
        needed: Function of a batch and a number of rows: the bytes for a step.
            For `Counted` it also takes a function that calls another one with
            arguments, and returns what that took.
        reserve: Where TensorFlow's allocator is to get them from.
    """

    def __init__(self, needed: Callable, reserve: "Reserve") -> None:
        self._needed = needed
        self._reserve = reserve
        self._measured: dict[int, int] = {}

    def most_rows(self, data, size: int, margin: int) -> int:
        """Returns how many rows there is room for, but not more than `size`.

        Args:
            data: A batch.
            size: Most rows of a step that are asked for.
            margin: Bytes to leave free: for the next batch, a copy of it, and
                what is not counted.

        Returns:
            A number from 0 to `size`.
        """
        raise NotImplementedError

    def _measure(self, data, rows):
        if rows not in self._measured:
            self._measured[rows] = self._bytes_for(data, rows)
        return self._measured[rows]

    def _bytes_for(self, data, rows):
        return self._needed(data, rows)


class Counted(Forecast):
    """For steps whose need is known once they were made."""

    def __init__(self, needed: Callable, reserve: "Reserve") -> None:
        super().__init__(needed, reserve)
        self._tracing = TRACING

    def most_rows(self, data, size: int, margin: int) -> int:
        """Makes steps on more and more rows, as long as there is room."""
        rows = 1
        while rows == 1 or rows * GROWTH <= size:
            needed = bytes_for(self._measured, rows)
            if not self._reserve.grow(needed, self._free(margin)):
                break
            self._measure(data, rows)
            rows *= GROWTH
        free = self._free(margin)
        size = largest(
            size, lambda rows: bytes_for(self._measured, rows) <= free
        )
        self._reserve.grow(bytes_for(self._measured, size), free)
        return size

    def _bytes_for(self, data, rows):
        return self._needed(data, rows, counting.counted_bytes)

    def _free(self, margin):
        # The update is yet to be traced, with a fraction of the operations.
        free = (system_memory.free_bytes() - margin - self._tracing) / OVERSHOOT
        if free < 0:
            # What the reserve has, it has.
            return self._reserve.size or int(free)
        return int(free) + self._reserve.size

    def _measure(self, data, rows):
        before = system_memory.address_space()
        needed = super()._measure(data, rows)
        tracing = system_memory.address_space() - before - needed
        self._tracing = max(self._tracing, tracing // 4)
        return needed


class Planned(Forecast):
    """For compiled steps, whose need is known before they are run."""

    def __init__(self, needed: Callable, reserve: "Reserve") -> None:
        super().__init__(needed, reserve)
        self._compiling = COMPILATION

    def most_rows(self, data, size: int, margin: int) -> int:
        """Compiles steps, on as many rows as may fit, until they do."""
        found, most = 0, size
        while self._free(margin) > 0:
            # No size is compiled that is known to need too much.
            rows = largest(
                most,
                lambda rows: (
                    bytes_for(self._measured, rows) <= self._free(margin)
                ),
            )
            if rows <= NEARLY * found:
                break
            if self._measure(data, rows) <= self._free(margin):
                found = rows
            else:
                most = rows - 1
        # The scratch memory of a program is one tensor.
        needed = self._measured.get(found, 0)
        self._reserve.grow(needed, self._free(margin), needed)
        return found

    def _free(self, margin):
        # The steps and the update are compiled when they are run. Most of what
        # that takes is there, from the compilations before.
        free = system_memory.free_bytes() - margin - self._compiling
        return max(int(free / OVERSHOOT), self._reserve.size)

    def _bytes_for(self, data, rows):
        is_first, before = not self._measured, system_memory.address_space()
        needed = super()._bytes_for(data, rows)
        grown = system_memory.address_space() - before
        # The first compilation leaves its memory to those that follow.
        self._compiling = max(
            self._compiling, grown // 4 if is_first else grown
        )
        return needed


class Reserve:
    """What TensorFlow's allocator for the CPU has at hand for steps.

    If it `keeps_regions`, each is twice as large as the one before. Where
    addresses are limited it would take nearly all that is left for one tensor,
    and leave nothing for anyone else. So it is made to ask for what a step will
    need when nobody else is at work, and cannot get much more.

    Attributes:
        size: Bytes that it has been made to get.
    """

    def __init__(self) -> None:
        self.size = 0

    def grow(self, needed: int, free: int, tensor: int = TENSOR) -> bool:
        """Gets what a step will need, and returns whether that much is free.

        Args:
            needed: Bytes of its tensors, all together.
            free: Bytes that may be used.
            tensor: Bytes of one of them.
        """
        if needed > free:
            return False
        limit = system_memory.address_limit()
        is_limited = limit is not None and keeps_regions()
        if is_limited and needed > self.size:
            more = needed - self.size if tensor < needed else needed
            count = -(-needed // tensor)
            region = int(OVERSHOOT * more) + TENSOR
            with kept_heap(region // 32 + TENSOR):
                rest = limit - system_memory.address_space() - region
                with ballast(rest), tf.device("CPU:0"):
                    # All at once: what there is, and what is added.
                    tensors = [
                        compat.uninitialized(tensor) for _ in range(count)
                    ]
                del tensors
            self.size = needed
        return True


def keeps_regions() -> bool:
    """Returns whether TensorFlow's allocator for the CPU keeps what is freed.

    It does where TensorFlow uses oneDNN, and counts then as well.
    """
    return counting.counts_tensors("CPU:0")


@contextlib.contextmanager
def kept_heap(size: int) -> Iterator[None]:
    """Makes the C library keep `size` bytes in one block, for who asks next.

    TensorFlow's allocator keeps books on each region, of a 32nd of its size,
    and makes them when the region is there and addresses may be gone.
    """
    # Once a block as large as this was freed, smaller ones are of the heap.
    bytearray(30 * 2**20)
    blocks = [bytearray(TENSOR) for _ in range(-(-size // TENSOR))]
    # The heap does not shrink as long as there is something at its end.
    end = bytearray(TENSOR)
    del blocks
    yield
    del end


@contextlib.contextmanager
def ballast(size: int) -> Iterator[None]:
    """Takes addresses, so that nobody else gets them within the context."""
    if size <= 0:
        yield
        return
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        yield


def largest(size: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number up to `size` that fits.

    If a number fits, so do all smaller ones.
    """
    if fits(size):
        return size
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # Kernels like their rows in eights, or in what else of these costs little.
    step = next((each for each in (8, 4, 2) if low >= 10 * each), 1)
    return low - low % step


def bytes_for(measured: dict[int, int], rows: int) -> int:
    """Returns the bytes that `rows` rows need, from what others needed."""
    if rows in measured:
        return measured[rows]
    if not measured:
        return 0
    # Of one number of rows it is not known what they need besides.
    few, many = sorted([0, *measured])[-2:]
    per_row = max(0, measured[many] - measured.get(few, 0)) / (many - few)
    if rows > many:
        per_row *= UNEVENNESS
    return int(measured[many] + per_row * (rows - many))
