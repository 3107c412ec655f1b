"""How many rows make a micro-batch: what is given, or what was found.

What is found is the largest size that fits, or the fastest of those. Which is
the fastest is seen in training itself: batches take turns with the largest size
that fits, half of it and a quarter, two with each, since the first may compile.
"""

import keras
from absl import logging

from keras_accum import compat
from keras_accum.options import AUTO
from keras_accum.options import LARGEST

# Most sizes that are tried: those that do not fit, and those that are timed.
ATTEMPTS = 8
# How much larger than what fits a size must be that did not, to try between.
NEARLY = 1.1
# How much slower than the fastest a larger size may be.
NEARLY_AS_FAST = 0.95


class MicrobatchSize:
    """Most rows of a micro-batch: given, or found by trying.

    Args:
        value: A positive int; "auto" or "largest" to find it; None for all rows
            of a batch.

    Attributes:
        value: As above; once a size was found, that.
        is_auto: Whether it is to be found, or was.
        limit: Then, the largest size to try, or None. A failure leaves one.
    """

    def __init__(self, value: int | str | None) -> None:
        self.value = value
        self.is_auto = value in (AUTO, LARGEST)
        self.limit: int | None = None
        self._kind = value
        # The smallest size that there was no memory for, and how many.
        self._failed: int | None = None
        self._failures = 0
        # What is yet to be timed, the next one last; the rows of batches that
        # count; and the rows per second of sizes.
        self._to_time: list[int] | None = None
        self._rows = 0
        self._speeds: dict[int, float] = {}

    @property
    def rows(self) -> int | None:
        """Rows to take at once; None for all, also if it is yet to be found."""
        return None if self.value in (AUTO, LARGEST) else self.value

    def to_try(self, rows: int) -> int:
        """Returns how many rows to take at once, of a batch of `rows` rows."""
        most = min(rows, self.limit or rows)
        if self._to_time and rows == self._rows:
            return min(most, self._to_time[-1])
        if self._is_between(most, rows):
            return min(rows, (most + self._failed) // 2)
        return most

    def _is_between(self, most, rows):
        """Returns whether to try a size above the largest that fits."""
        return (
            self._kind == LARGEST
            and self.rows == most < rows
            and self._failed is not None
            and self._failed > NEARLY * most
            and self._failures < ATTEMPTS
        )

    def record_failure(self, size: int, smaller: int) -> None:
        """Records that there was no memory for a size.

        Args:
            size: The size.
            smaller: What to try next.
        """
        self._failed = min(size, self._failed or size)
        self._failures += 1
        # What fitted before does so, unless that is what failed.
        fits = self.rows or 0
        self.limit = max(smaller, fits) if fits < size else smaller
        self._to_time, self._speeds = None, {}

    def record_fit(self, size: int) -> bool:
        """Records that a size fits; returns whether that changes the value."""
        # A short batch says nothing of longer ones.
        before = self.rows or 0
        if self.limit is not None:
            self.limit = max(self.limit, size)
        found = max(size, before) if self.limit is None else self.limit
        if found == self.value:
            return False
        self.value = found
        if before == 0 or self.limit is not None:
            logging.warning(
                'microbatch_size="%s": found that %d rows at once fit on '
                "each device.",
                self._kind,
                found,
            )
        return True

    def is_timed(self, rows: int) -> bool:
        """Returns whether it counts how long a batch of `rows` rows takes."""
        is_over = self._to_time == []
        return self._kind == AUTO and rows >= self._rows and not is_over

    def record_time(self, size: int, rows: int, seconds: float) -> bool:
        """Records how long a batch took; returns whether the value changes.

        Args:
            size: How many rows were taken at once.
            rows: How many rows there were.
            seconds: How long it took.
        """
        if not self.is_timed(rows):
            return False
        if self._to_time is None or rows > self._rows:
            # Two batches with each: the first one is not timed.
            some = dict.fromkeys([self.value // 4, self.value // 2, self.value])
            self._to_time = [n for n in some if n for _ in range(2)]
            self._rows = rows
        if size != min(self._to_time[-1], rows):
            return False
        self._speeds[self._to_time.pop()] = rows / seconds
        return not self._to_time and self._take_fastest()

    def end_timing(self) -> bool:
        """Times no more sizes; returns whether that changes the value."""
        self._to_time = []
        return bool(self._speeds) and self._take_fastest()

    def _take_fastest(self):
        best = NEARLY_AS_FAST * max(self._speeds.values())
        fastest = max(n for n, speed in self._speeds.items() if speed >= best)
        tried = ", ".join(map(str, sorted(self._speeds)))
        if fastest == self.value:
            return False
        logging.warning(
            'microbatch_size="auto": of %s rows at once, %d are the fastest.',
            tried,
            fastest,
        )
        self.value = self.limit = fastest
        return True


def check_layers(model: keras.Model) -> None:
    """Raises a `ValueError` if rows of a batch would be taken as its past."""
    stateful = compat.stateful_layers(model)
    if stateful:
        raise ValueError(
            "`microbatch_size` does not work with recurrent layers that are "
            "`stateful`: each goes on, row by row, from the state that the "
            "batch before has left, and the rows of one batch do not follow "
            "each other in time. Use `accum_steps`, with batches as they "
            f"follow each other. Received: stateful layer {stateful[0].name!r}"
        )
