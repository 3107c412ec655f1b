"""What steps on any number of rows need, from what steps on some need.

It grows with the rows, nearly along a line, so that few sizes tell of the
others: a fixed amount, and an amount for each row.
"""

import bisect
from collections.abc import Callable

# How far the bytes of a size may lie from the line, for that to be enough.
NEAR_LINE = 0.03


class Line:
    """The bytes of steps on any number of rows, from those of some.

    Args:
        measure: Returns the bytes of a step on a number of rows.

    Attributes:
        known: What it returned, by the rows.
    """

    def __init__(self, measure: Callable[[int], int]) -> None:
        self._measure = measure
        self.known: dict[int, int] = {}

    def __call__(self, rows: int) -> int:
        """Returns the bytes of a step on so many rows."""
        return on_line(self.known, rows)

    def plan(self, rows: list[int]) -> None:
        """Measures what costs no memory: the ends, and where lines bend.

        Args:
            rows: Sizes, most rows first.
        """
        self._learn(rows[0])
        self._learn(rows[-1])
        self._bend(rows)

    def _bend(self, rows):
        """Measures in the middle, and goes on if that is not on the line."""
        if len(rows) < 3:
            return
        middle = len(rows) // 2
        if rows[middle] not in self.known:
            expected = self(rows[middle])
            found = self._learn(rows[middle])
            if abs(found - expected) <= NEAR_LINE * found:
                return
        self._bend(rows[: middle + 1])
        self._bend(rows[middle:])

    def run(self, rows: list[int], room: int) -> None:
        """Measures steps that are run, as long as there is room.

        Args:
            rows: Sizes, most rows first.
            room: Bytes that there are.
        """
        # Of the first two, all that is known is that they are few.
        for each in [1, 2, *reversed(rows)]:
            if self.known and 2 * self(each) > room:
                break
            self._learn(each)

    def _learn(self, rows):
        if rows not in self.known and (found := self._measure(rows)):
            self.known[rows] = found
        return self(rows)


def on_line(known: dict[int, int], rows: int) -> int:
    """Returns the bytes that `rows` rows need, from what others needed.

    Args:
        known: Bytes, by the number of rows.
        rows: Any number of rows.
    """
    if rows in known or not known:
        return known.get(rows, 0)
    others = sorted(known)
    less = bisect.bisect(others, rows)
    if len(known) == 1:
        # What is for all rows together is not known.
        low, high = 0, others[0]
    elif less:
        upper = min(less, len(others) - 1)
        low, high = others[upper - 1], others[upper]
    else:
        # The smallest may be too close to each other to tell.
        low, high = others[0], others[-1]
    slope = (known[high] - known.get(low, 0)) / (high - low)
    found = int(known[high] + slope * (rows - high))
    # TensorFlow does not count small tensors.
    return max(found, 0 if less else known[others[0]] * rows // others[0])
