"""When a window ends: its size, which may follow a schedule, and its position.

All of it lives on the host. A predicate that the device computed would make
the host wait for the device at every micro-batch.
"""

from collections.abc import Callable
from numbers import Integral

import numpy as np
import tensorflow as tf

from keras_accum import replicas

# An int, or a function from the number of updates so far to an int.
AccumSteps = int | Callable[[int], int]

PARTIAL_WINDOW_POLICIES = ("flush", "carry", "drop")


class Window:
    """The position in the current window, and the size it was begun with.

    As ordinary code:

    ```python
    if position == 0:
        size = accum_steps  # or accum_steps(updates)
    position += 1
    if position >= size:
        position = 0
    ```

    The real thing is the same in TensorFlow variables on the host's CPU, since
    several steps may run in one call of a compiled loop. Changing `accum_steps`
    assigns a variable, so nothing is traced again.

    Args:
        accum_steps: Micro-batches per window: a positive int, or a function
            that gets the number of updates so far, an int, and returns one.

    Attributes:
        position: Micro-batches in the window so far; an int64 scalar.
        size: Micro-batches that the current window was begun for; likewise.
        completed: Windows that were filled so far; likewise.
        schedule_error: What `accum_steps`, a function, raised, if it did.
    """

    def __init__(self, accum_steps: AccumSteps) -> None:
        names = ("position", "size", "completed", "next_size")
        self.position, self.size, self.completed, self._next_size = (
            replicas.on_host(lambda: [host_counter(name) for name in names])
        )
        self.schedule_error: Exception | None = None
        self.accum_steps = accum_steps

    @property
    def accum_steps(self) -> AccumSteps:
        """Micro-batches per window; a change holds from the next window on."""
        return self._accum_steps

    @accum_steps.setter
    def accum_steps(self, value: AccumSteps) -> None:
        self._accum_steps = check_accum_steps(value)
        if not callable(value):
            self._next_size.assign(int(value))

    def begin(self, updates: tf.Tensor) -> tf.Tensor:
        """Fixes the size of the window that begins, and returns it.

        Args:
            updates: Number of updates so far; an integer scalar.
        """
        if callable(self._accum_steps):
            size = tf.numpy_function(self._scheduled, [updates], tf.int64)
            size = tf.ensure_shape(size, ())
        else:
            size = self._next_size
        return tf.identity(self.size.assign(size))

    def advance(self) -> tf.Tensor:
        """Counts a micro-batch; returns whether the window is now full."""
        self.position.assign_add(1)
        return self.position >= self.size

    def complete(self) -> None:
        """Ends a full window; the next one may begin."""
        self.completed.assign_add(1)
        self.rewind()

    def rewind(self) -> None:
        """Goes back to the start of a window."""
        self.position.assign(0)

    def _scheduled(self, updates):
        # TensorFlow would make the error one of its own, with this as text.
        try:
            size = self._accum_steps(int(updates))
            return check_scheduled(size, int(updates))
        except Exception as error:
            self.schedule_error = error
            raise


def host_counter(name):
    """An int64 scalar variable that starts at 0."""
    return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)


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
    if not isinstance(value, str) or value not in PARTIAL_WINDOW_POLICIES:
        policies = ", ".join(f'"{name}"' for name in PARTIAL_WINDOW_POLICIES)
        raise ValueError(
            f"`partial_window` must be one of {policies}. "
            f"Received: partial_window={value!r}"
        )
    return value
