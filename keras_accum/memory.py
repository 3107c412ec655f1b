"""What a step will need of a CPU's memory, and how many rows there is room for.

A GPU that has no memory left says so, and nothing else happens. A CPU's
allocator says so as well; but then other threads, XLA's compiler and the
kernels' libraries ask for a little more, get nothing, and end the process. So a
CPU is not asked for what it is known not to have.

A compiled step says how much it needs: XLA plans that, but for addresses that
convolutions take (see `compat.MemoryPlan`). Of one that is not compiled,
TensorFlow or Linux counts what it took. So steps on few rows come first, and
what those on more rows need follows from these: it is a fixed amount, and an
amount for each row. The first may hide the second, so that no size is far from
those that were tried.
"""

from collections.abc import Callable
from typing import Any

from absl import logging

from keras_accum import compat
from keras_accum import counting
from keras_accum import forecast
from keras_accum import heap
from keras_accum import system_memory
from keras_accum.reserve import Reserve

# What a forecast leaves free, for what is not counted: threads, their heaps,
# and the kernels' own libraries. `tests/auto_size_test.py` tries some limits.
MARGIN = 128 * 2**20
# What of that is not for compiling.
NOT_COMPILING = MARGIN // 2
# What tracing the update takes at least.
TRACING = 16 * 2**20
# How close to the best number of rows is near enough.
CLOSE = 1.05
# What compiling takes at least: first, when it starts threads, and later.
FIRST_COMPILATION = 160 * 2**20
COMPILATION = 16 * 2**20
# How far peaks of more rows may lie above the line through peaks of few.
UNEVENNESS = 1.15
# Most rows of one step on trial, over rows of the step before, and least.
GROWTH = 4
WORTH = 1.5
# Most steps on trial.
TRIALS = 8


class Room:
    """How many rows of batches there is room for, on a CPU.

    Args:
        needed: What a step needs, as for `Planned` if steps are compiled, else
            as for `Counted`.
        is_compiled: Whether they are.
        update: Function: the bytes for the update, if it is compiled. It is
            called more than once.
        saving: Function: the bytes that it takes to save the model.
    """

    def __init__(
        self,
        needed: Callable,
        is_compiled: bool,
        update: Callable[[], int],
        saving: Callable[[], int],
    ) -> None:
        self._needed, self._is_compiled = needed, is_compiled
        self._update, self._saving = update, saving
        self._reserve = Reserve()
        heap.share()
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
            self._forecasts[shapes] = self._make_forecast()
        rows = self._forecasts[shapes].most_rows(data, size, count)
        # What more rows took before is kept for steps, and not free.
        rows = max(rows, self._allowed.get(shapes, 0))
        if not rows and system_memory.address_limit() is None:
            # Memory may be had by swapping, or be free again.
            logging.warning(
                "No memory is known to be free for one row. It is tried: if "
                "the system ends the process, one row does not fit."
            )
            rows = 1
        self._allowed[shapes] = rows
        return rows

    def has_room_to_make(self) -> bool:
        """Returns whether steps may be made that nobody needs."""
        return all(each.has_room_to_make() for each in self._forecasts.values())

    def _make_forecast(self):
        saving = self._saving()
        if self._is_compiled:
            return Planned(self._needed, self._reserve, saving, self._update)
        return Counted(self._needed, self._reserve, saving)


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
        needed: Function of a batch and a number of rows: what a step needs, as
            a `MemoryPlan` for `Planned`, and in bytes for `Counted`. For that
            it also takes a function that calls another one with arguments, and
            returns what that took.
        reserve: Where TensorFlow's allocator is to get them from.
        saving: Bytes that it takes to save the model.
    """

    def __init__(self, needed: Callable, reserve: Reserve, saving: int) -> None:
        self._needed = needed
        self._reserve, self._saving = reserve, saving
        # What of that is left free, once it is known.
        self._for_saving: int | None = None
        self._measured: dict[int, int] = {}
        # Bytes that it took to trace or compile a step, at most.
        self._making = 0
        # What steps of the rows found take of what is free, each time.
        self._for_steps = 0

    def most_rows(self, data, size: int, count: int) -> int:
        """Returns how many rows there is room for, but not more than `size`.

        Args:
            data: A batch.
            size: Most rows of a step that are asked for.
            count: Bytes of the batch. Room is left for the next one, and a copy
                of it.

        Returns:
            A number from 0 to `size`.
        """
        raise NotImplementedError

    def has_room_to_make(self) -> bool:
        """Returns whether there is room for a step more, that nobody needs."""
        # Validation is yet to be made as well.
        left = MARGIN + self._making + self._for_steps + (self._for_saving or 0)
        return system_memory.free_bytes() >= left

    def _without_saving(self, free, left):
        """Returns what of `free` bytes is for steps, and not to save the model.

        A quarter at least is for steps; and all of it if the model could not be
        saved with the rest. It is decided once: later, less is free.

        Args:
            free: The bytes.
            left: Bytes that are left for others, half of which is free when the
                model is saved.
        """
        if self._for_saving is None and self._measured:
            most = 3 * max(0, free) // 4
            can_save = self._saving <= most + left // 2
            self._for_saving = min(self._saving, most) if can_save else 0
        return free - (self._for_saving or 0)

    def _measure(self, data, rows):
        if rows not in self._measured:
            self._measured[rows] = self._bytes_for(data, rows)
        return self._measured[rows]

    def _bytes_for(self, data, rows):
        return self._needed(data, rows)


class Counted(Forecast):
    """For steps whose need is known once they were made."""

    def most_rows(self, data, size: int, count: int) -> int:
        """Makes steps on more and more rows, as long as there is room."""
        rows = max((each for each in self._measured if each <= size), default=1)
        while self._try(data, rows, count):
            more = self._most_allowed(size, count)
            if rows == 1:
                # Of one row it is not known what is for all: gradients.
                more = max(more, min(2, size))
            is_enough = len(self._measured) >= TRIALS or more < WORTH * rows
            if is_enough or more == size:
                break
            rows = more
        found = self._most_allowed(size, count)
        if found:
            free = self._free(count)
            needed = min(self._at_most(found), free)
            # The next batch comes out of what is there for steps.
            self._reserve.grow(needed + count, free + count)
        return found

    def _try(self, data, rows, count):
        """Makes a step on so many rows, if there is room for that."""
        is_second = list(self._measured) == [1]
        free = self._until_end(count) if is_second else self._free(count)
        if not self._reserve.grow(bytes_for(self._measured, rows), free):
            return False
        self._measure(data, rows)
        return True

    def _most_allowed(self, size, count):
        """Returns how many rows fit, as far as is known."""
        known = max(self._measured, default=0)
        free, end = self._free(count), self._until_end(count)

        def fits(rows):
            most = self._at_most(rows)
            return bytes_for(self._measured, rows) <= free and most <= end

        # TensorFlow counts no small tensors, which many rows make large.
        return largest(min(size, GROWTH * known), fits)

    def _at_most(self, rows):
        """Returns the bytes that `rows` rows need, if it is all for rows.

        The line through few rows may be flat: gradients hide what is for rows
        until these are many.
        """
        most = max(self._measured, default=0)
        needed = bytes_for(self._measured, rows)
        if rows <= most:
            return needed
        return max(needed, bytes_for({most: self._measured[most]}, rows))

    def _bytes_for(self, data, rows):
        return self._needed(data, rows, counting.counted_bytes)

    def _free(self, count):
        # What the reserve has, it has.
        has = self._idle(count)
        # The update is yet to be traced, with a fraction of the operations.
        tracing = self._making // 4
        if system_memory.address_limit() is None:
            # So is validation, and what each size keeps is not had back.
            tracing = self._making
        left = MARGIN + max(TRACING, tracing)
        free = system_memory.free_bytes() - 2 * count - left
        free = self._reserve.for_many(self._without_saving(free, left))
        return free + has if free > 0 else has or free

    def _until_end(self, count):
        """Returns the bytes that a step may take before the process dies."""
        free = system_memory.free_bytes() - 2 * count - MARGIN
        return free + self._idle(count)

    def _idle(self, count):
        """Returns the bytes that are there for steps, and not free."""
        return max(0, self._reserve.at_hand() - count)

    def _measure(self, data, rows):
        before = max(self._measured.values(), default=0)
        live = counting.live_bytes("CPU:0")
        needed, took = growing(super()._measure, data, rows)
        # Tensors take what those of other steps have left.
        took -= max(0, needed - before)
        if system_memory.address_limit() is None:
            # The first step makes the buffers, which are made once.
            took -= max(0, counting.live_bytes("CPU:0") - live)
        self._making = max(self._making, took)
        return needed


class Planned(Forecast):
    """For compiled steps, whose need is known before they are run."""

    def __init__(
        self,
        needed: Callable,
        reserve: Reserve,
        saving: int,
        update: Callable[[], int],
    ) -> None:
        super().__init__(needed, reserve, saving)
        self._plan_update, self._for_update = update, 0
        # What steps take of addresses alone.
        self._mapped: dict[int, int] = {}

    def most_rows(self, data, size: int, count: int) -> int:
        """Compiles steps, on as many rows as may fit, until they do."""

        def fits(rows):
            taken = self._reserve.taken(self._with_batch(rows, count))
            mapped = bytes_for(self._mapped, rows)
            # What takes nothing more always has room.
            return not taken or taken + mapped <= self._free(count)

        known = [rows for rows in self._measured if rows <= size and fits(rows)]
        found = max(known, default=0)
        while (rows := self._to_try(size, fits)) > CLOSE * found:
            if found and not self.has_room_to_make():
                break
            self._measure(data, rows)
            # Close to what is known, the line says enough. What compiling has
            # taken may make it the most that fits.
            near = largest(rows, fits)
            if CLOSE * near >= rows:
                found = near
        # The last one may have left less than there was.
        found = largest(found, fits)
        if found:
            self._reserve.grow_by_one(self._with_batch(found, count))
            self._for_steps = bytes_for(self._mapped, found)
        return found

    def _to_try(self, size, fits):
        """Returns the most rows that may fit, or 0."""
        rows, least = largest(size, fits), min(self._measured, default=1)
        if rows or least == 1:
            return rows
        # Few rows may need much less than a line through many says.
        return min(size, max(1, least // GROWTH))

    def _with_batch(self, rows, count):
        """Returns the bytes of one tensor for a program and the next batch.

        The scratch memory of a program is one tensor. Step and update follow
        each other, so that both use it. The batch is made between two steps,
        out of what is there for these.
        """
        step = bytes_for(self._measured, rows)
        return max(step, self._for_update) + count

    def _free(self, count):
        # The steps and the update are compiled when they are run, and so is
        # validation. A copy of the next batch is made elsewhere.
        left = NOT_COMPILING + FIRST_COMPILATION
        if self._measured:
            left = left_free(max(COMPILATION, self._making))
        free = system_memory.free_bytes() - count - left
        return self._without_saving(free, left)

    def _bytes_for(self, data, rows):
        plan = self._growing(super()._bytes_for, data, rows)
        self._mapped[rows] = mapped_bytes(plan)
        # A step that was traced has told what the update is of. What it takes
        # to compile that is then free for when it is run.
        self._for_update = self._growing(self._plan_update)
        return plan.planned

    def _growing(self, function, *args):
        result, took = growing(function, *args)
        self._making = max(self._making, took)
        return result


def mapped_bytes(plan: compat.MemoryPlan) -> int:
    """Returns what a step takes besides what is planned, if that is limited."""
    return 0 if system_memory.address_limit() is None else plan.mapped


def left_free(compiling: int) -> int:
    """Returns the bytes to leave free where compiling a step took so many.

    After that, steps, the update and validation took 1.0 to 1.5 times as many,
    and now and then a heap of 64 MiB. A language model that is fast to compile
    took twice as many.
    """
    return max(MARGIN, NOT_COMPILING + 3 * compiling // 2)


def growing(function: Callable, *args) -> tuple[Any, int]:
    """Calls a function; returns its result, and the bytes it took for good."""
    before = used_bytes()
    result = function(*args)
    return result, used_bytes() - before


def used_bytes() -> int:
    """Returns the bytes that the process has of what is limited.

    These are addresses, or memory if those are not limited. What is in memory
    of files does not count: the system takes it back. It is 0 if not known.
    """
    if system_memory.address_limit() is None:
        try:
            return system_memory.anonymous_bytes()
        except (OSError, IndexError):
            # Another system, or a sandbox that does not say.
            return 0
    # Threads stay, and are not started a second time.
    return system_memory.address_space() - system_memory.stack_space()


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
    found, most = forecast.on_line(measured, rows), max(measured, default=0)
    if rows <= most:
        return found
    known = measured.get(most, 0)
    # What was counted of two steps may differ by more than the rows cost.
    return int(known + UNEVENNESS * max(0, found - known))
