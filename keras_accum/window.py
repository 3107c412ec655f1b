"""When a window ends: its size, which may follow a schedule, and its position.

All of it lives on the host. A predicate that the device computed would make
the host wait for the device at every micro-batch.
"""

import contextlib
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_accum import replicas

# An int, or a function from the number of updates so far to an int.
AccumSteps = int | Callable[[int], int]

PARTIAL_WINDOW_POLICIES = ("flush", "carry", "drop")


class Place(NamedTuple):
    """Where in its window a micro-batch is; it may be both."""

    is_first: bool
    is_last: bool


class Window:
    """The position in the current window, and the size it was begun with.

    As ordinary code:

    ```python
    if position == 0:
        size = accum_steps  # or accum_steps(updates), or what is solved for
    position += 1
    if position >= size:
        position = 0
    ```

    The real thing is the same in TensorFlow variables on the host's CPU, since
    several steps may run in one call of a compiled loop. Changing `accum_steps`
    assigns a variable, so nothing is traced again. Where steps are called one
    by one, Python counts, and the variables catch up when they are asked for.

    Args:
        accum_steps: Micro-batches per window: a positive int, or a function
            that gets the number of updates so far, an int, and returns one.
        effective_batch_size: Rows per window, over all replicas; in place of
            `accum_steps`, which follows from it and from the first batch.

    Attributes:
        completed: Windows that were filled so far; an int64 scalar.
        schedule_error: What was raised, on the host, by `accum_steps`, a
            function, or because the effective batch size is no multiple.
    """

    def __init__(
        self,
        accum_steps: AccumSteps,
        effective_batch_size: int | None = None,
    ) -> None:
        names = ("position", "size", "completed", "next_size")
        self._position, self._size, self.completed, self._next_size = (
            replicas.on_host(lambda: [host_counter(name) for name in names])
        )
        # Position and size, where Python is ahead of the variables.
        self._counted: tuple[int, int] | None = None
        self.schedule_error: Exception | None = None
        self._effective_batch_size: int | None = None
        self.accum_steps = accum_steps
        if effective_batch_size is not None:
            self.effective_batch_size = effective_batch_size

    @property
    def position(self) -> tf.Variable:
        """Micro-batches in the window so far; an int64 scalar."""
        self.catch_up()
        return self._position

    @property
    def size(self) -> tf.Variable:
        """Micro-batches that the current window was begun for; likewise."""
        self.catch_up()
        return self._size

    @property
    def accum_steps(self) -> AccumSteps:
        """Micro-batches per window; a change holds from the next window on."""
        return self._accum_steps

    @accum_steps.setter
    def accum_steps(self, value: AccumSteps) -> None:
        self._accum_steps = check_accum_steps(value)
        self._effective_batch_size = None
        if not callable(value):
            self._next_size.assign(int(value))

    @property
    def effective_batch_size(self) -> int | None:
        """Rows per window, over all replicas; None if `accum_steps` is given.

        Until a batch was seen, `accum_steps` is 1.
        """
        return self._effective_batch_size

    @effective_batch_size.setter
    def effective_batch_size(self, value: int | None) -> None:
        value = check_effective_batch_size(value)
        self.accum_steps = 1
        self._effective_batch_size = value
        self.forget_solution()

    @property
    def accumulates(self) -> bool:
        """Whether a window may have more than one micro-batch."""
        return self.kind != "size" or self._accum_steps != 1

    @property
    def kind(self) -> str:
        """What a traced `begin` goes by."""
        if self._effective_batch_size is not None:
            return "rows"
        return "schedule" if callable(self._accum_steps) else "size"

    def forget_solution(self) -> None:
        """Lets the next batch decide how many make an effective batch."""
        self._is_solved = False

    def begin(
        self,
        updates: tf.Tensor,
        rows: Callable[[], tf.Tensor] | None = None,
        replicas: int = 1,
    ) -> tf.Tensor:
        """Fixes the size of the window that begins, and returns it.

        Args:
            updates: Number of updates so far; an integer scalar.
            rows: Returns the rows of the batch, on all replicas together; an
                integer scalar. Needed with `effective_batch_size`.
            replicas: How many replicas these are on.
        """
        if self.kind == "size":
            size = self._next_size
        elif self.kind == "schedule":
            size = on_host_python(self._scheduled, updates)
        else:
            size = on_host_python(
                lambda rows: self._solved(int(rows), replicas), rows()
            )
        return tf.identity(self._size.assign(size))

    def advance(self) -> tf.Tensor:
        """Counts a micro-batch; returns whether the window is now full."""
        self._position.assign_add(1)
        return self._position >= self._size

    def complete(self) -> None:
        """Ends a full window; the next one may begin."""
        self.completed.assign_add(1)
        self._position.assign(0)

    def rewind(self) -> None:
        """Goes back to the start of a window."""
        self.position.assign(0)

    def place(self) -> Place:
        """Where the next micro-batch is, for steps that are called one by one.

        Takes the place of `begin`, where `accum_steps` is an int.
        """
        position, size = self._counted or self._read()
        if position == 0:
            size = int(self._accum_steps)
        self._counted = position, size
        return Place(position == 0, position + 1 >= size)

    def count(self, place: Place) -> None:
        """Counts the micro-batch at `place`; takes that of `advance`."""
        # Somebody may have asked for the variables since.
        position, size = self._counted or self._read()
        self._counted = 0 if place.is_last else position + 1, size

    def _read(self):
        return int(self._position), int(self._size)

    def catch_up(self) -> None:
        """Lets the variables hold what Python counted."""
        if self._counted is not None:
            (position, size), self._counted = self._counted, None
            with tf.init_scope():
                self._position.assign(position)
                self._size.assign(size)

    def _scheduled(self, updates):
        with self._keeping_errors():
            size = self._accum_steps(int(updates))
            return check_scheduled(size, int(updates))

    def _solved(self, rows, replicas):
        # The epoch's last batch may be short; the first one is not.
        with self._keeping_errors():
            if not self._is_solved:
                self._accum_steps = solve(
                    self._effective_batch_size, rows, replicas
                )
                self._is_solved = True
            return np.int64(self._accum_steps)

    @contextlib.contextmanager
    def _keeping_errors(self):
        # TensorFlow would make the error one of its own, with this as text.
        try:
            yield
        except Exception as error:
            self.schedule_error = error
            raise


def host_counter(name):
    """An int64 scalar variable that starts at 0."""
    return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)


def on_host_python(function, value):
    """Calls a Python function with an integer, for an int64 scalar."""
    return tf.ensure_shape(tf.numpy_function(function, [value], tf.int64), ())


def solve(effective_batch_size, rows, replicas):
    """How many batches of so many rows make an effective batch.

    Raises:
        ValueError: If no whole number of them does.
    """
    accum_steps, rest = divmod(effective_batch_size, rows)
    if rest or not accum_steps:
        raise ValueError(
            "`effective_batch_size` must be a multiple of the rows that a "
            "micro-batch has on each replica, times the replicas. Received: "
            f"effective_batch_size={effective_batch_size}, with "
            f"{rows / replicas:g} rows on each of {replicas} replicas, "
            f"{rows} together. Choose a multiple of {rows}, or another "
            "`batch_size` in `fit`."
        )
    return accum_steps


def check_effective_batch_size(value):
    """Returns `value`, or raises unless it is None or a positive int."""
    if value is not None:
        check_positive_int(
            value,
            "`effective_batch_size` must be a positive integer or None. "
            f"Received: effective_batch_size={value!r}",
        )
    return value


def check_accum_steps(value):
    """Returns `value`, or raises unless it is a positive int or a function."""
    if not callable(value):
        check_positive_int(
            value,
            "`accum_steps` must be a positive integer, or a function of the "
            "number of updates that returns one. "
            f"Received: accum_steps={value!r}",
        )
    return value


def check_scheduled(value, updates):
    """Returns what a schedule gave as int64, or raises if it can't be."""
    check_positive_int(
        value,
        "A function given as `accum_steps` must return a positive integer. "
        f"Received: accum_steps({updates})={value!r}",
    )
    return np.int64(value)


def check_positive_int(value, message):
    """Raises with `message` unless `value` is an integer of at least 1."""
    # A bool is an int to Python, and a mistake here.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{message} (of type {type(value).__name__})")
    if value < 1:
        raise ValueError(message)


def check_partial_window(value):
    """Returns `value`, or raises unless it names a policy."""
    return check_policy("partial_window", value, PARTIAL_WINDOW_POLICIES)


def check_policy(argument, value, policies):
    """Returns `value` of an argument, or raises unless it is in `policies`."""
    if not isinstance(value, str) or value not in policies:
        names = ", ".join(f'"{name}"' for name in policies)
        raise ValueError(
            f"`{argument}` must be one of {names}. "
            f"Received: {argument}={value!r}"
        )
    return value
