"""A table of the updates from which each number of micro-batches holds."""

import bisect
import copy
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import Self
from typing import get_args

from keras_accum.checks import check_positive

Unit = Literal["updates", "samples", "tokens"]
UNITS = get_args(Unit)


class Configured:
    """What has a configuration: its arguments, which say all of it.

    Args:
        config: The arguments of the class, checked.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return copy.deepcopy(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes a schedule from its configuration."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return shown(type(self).__name__, self._config)


class Schedule(Configured):
    """What most schedules share: a table.

    Args:
        config: As for `Configured`.
        starts: The updates from which each of `values[1:]` holds.
        values: Micro-batches per window.
    """

    def __init__(
        self,
        config: dict[str, Any],
        starts: Sequence[int],
        values: Sequence[int],
    ) -> None:
        super().__init__(config)
        self._starts = starts
        self._values = values

    def __call__(self, updates: int) -> int:
        """Returns the micro-batches of a window that begins after `updates`."""
        return self._values[bisect.bisect_right(self._starts, updates)]


def shown(
    name: str,
    arguments: dict[str, Any],
    show: Callable[[Any], str] = repr,
) -> str:
    """Returns a call as one would write it."""
    items = (f"{name}={show(value)}" for name, value in arguments.items())
    return f"{name}({', '.join(items)})"


def starts_in_updates(
    boundaries: Sequence[int], values: Sequence[int], microbatch: int
) -> list[int]:
    """Returns the updates from which each of `values[1:]` holds.

    Boundaries count what `microbatch` does, samples or tokens.
    """
    starts = []
    updates = seen = 0
    for boundary, k in zip(boundaries, values[:-1], strict=True):
        # Of the windows that begin before the boundary the last may pass it,
        # and further boundaries with it: no window has the values of these.
        windows = max(0, -((seen - boundary) // (k * microbatch)))
        updates += windows
        seen += windows * k * microbatch
        starts.append(updates)
    return starts


def check_unit(unit, microbatch):
    """Returns both, named, or raises unless they go together."""
    if not isinstance(unit, str) or unit not in UNITS:
        units = ", ".join(f'"{name}"' for name in UNITS)
        raise ValueError(
            f"`unit` must be one of {units}. Received: unit={unit!r}"
        )
    microbatch = check_int("microbatch", microbatch)
    # Whoever gives it wants samples or tokens counted, and forgot the unit.
    if unit == "updates" and microbatch != 1:
        raise ValueError(
            '`microbatch` must be left out with `unit="updates"`. Received: '
            f'microbatch={microbatch}. Set `unit` to "samples" or "tokens" to '
            "count them."
        )
    return {"unit": unit, "microbatch": microbatch}


def check_ints(name, values):
    """Returns `values` as a list of ints, or raises if it can't be."""
    message = (
        f"`{name}` must be a sequence of positive integers. "
        f"Received: {name}={values!r}"
    )
    if not isinstance(values, Iterable):
        raise TypeError(f"{message} (of type {type(values).__name__})")
    values = list(values)
    for value in values:
        check_positive(value, message)
    return [int(value) for value in values]


def check_int(name, value):
    """Returns `value` as an int, or raises unless it is a positive integer."""
    check_positive(
        value,
        f"`{name}` must be a positive integer. Received: {name}={value!r}",
    )
    return int(value)
