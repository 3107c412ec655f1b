"""Where in its window a micro-batch is, and whether it is the last.

All of it lives on the host. A predicate that the device computed would make
the host wait for the device at every micro-batch.
"""

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from keras_accum import replicas
from keras_accum.options import Options
from keras_accum.options import check_scheduled


class Position:
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
    by one, Python counts in their place, until `write` is called.

    Args:
        options: How large a window is.

    Attributes:
        accum_steps: Micro-batches per window, as given or as solved for.
        completed: Windows that were filled so far; an int64 scalar.
        error: What was raised, on the host, by `accum_steps`, a function, or
            because the effective batch size is no multiple; None if nothing.
    """

    def __init__(self, options: Options) -> None:
        names = ("position", "size", "completed", "next_size")
        self._position, self._size, self.completed, self._next_size = (
            replicas.on_host(lambda: [host_counter(name) for name in names])
        )
        # Position and size, where Python is ahead of the variables.
        self._counted: tuple[int, int] | None = None
        self.error: Exception | None = None
        self.set_options(options)

    @property
    def variable(self) -> tf.Variable:
        """The micro-batches so far, after a `write`; an int64 scalar."""
        return self._position

    def set_options(self, options: Options) -> None:
        """Sets another size, which holds from the next window on."""
        self._options = options
        # An effective batch size is 1 micro-batch until a batch was seen.
        self.accum_steps = options.accum_steps
        self.forget_solution()
        if not callable(self.accum_steps):
            self._next_size.assign(int(self.accum_steps))

    def forget_solution(self) -> None:
        """Forgets how many micro-batches make an effective batch.

        The next batch decides anew.
        """
        self._is_solved = False

    def read(self) -> tuple[int, int]:
        """Returns the micro-batches so far, and those of a full window."""
        if self._counted is not None:
            return self._counted
        return int(self._position), int(self._size)

    def write(self) -> None:
        """Assigns to the variables what Python counted."""
        if self._counted is not None:
            (position, size), self._counted = self._counted, None
            with tf.init_scope():
                self._position.assign(position)
                self._size.assign(size)

    def move_to(self, position: int, size: int | None = None) -> None:
        """Moves to another position, in a window of this or another size."""
        _, before = self.read()
        self._counted = position, before if size is None else size
        self.write()

    # Where Python counts: steps are called one by one.

    def next_is_last(self) -> bool:
        """Returns whether the next micro-batch makes the window full.

        If it begins the window, that gets its size; `accum_steps` is an int.
        """
        position, size = self.read()
        if position == 0:
            size = int(self.accum_steps)
        self._counted = position, size
        return position + 1 >= size

    def count(self, is_last: bool) -> None:
        """Counts a micro-batch: the last one of its window, or another."""
        position, size = self.read()
        self._counted = 0 if is_last else position + 1, size

    # Where the variables count: within a `tf.function`, or eagerly.

    def begin_if_first(self, *args) -> tf.Tensor:
        """Returns the size of the window; `begin` fixes it if none is begun.

        Args:
            *args: As for `begin`.
        """
        return tf.cond(
            tf.equal(self._position, 0),
            lambda: self.begin(*args),
            lambda: tf.identity(self._size),
        )

    def begin(
        self,
        updates: tf.Tensor,
        rows: Callable[[], tf.Tensor] | None = None,
        num_replicas: int = 1,
        noise: tf.Variable | None = None,
    ) -> tf.Tensor:
        """Fixes the size of the window that begins, and returns it.

        Args:
            updates: Number of updates so far; an integer scalar.
            rows: Returns the rows of the batch, on all replicas together; an
                integer scalar. Needed with `effective_batch_size`.
            num_replicas: How many replicas these are on.
            noise: The interval of the noise scale, in micro-batches, if the
                size follows it; a float32 vector.
        """
        kind = self._options.window_kind
        if noise is not None:
            unit = rows() if kind == "rows" and rows is not None else 1
            size = call_on_host(
                functools.partial(self._followed, num_replicas),
                *(updates, noise, self._size, unit),
            )
        elif kind == "count":
            size = self._next_size
        elif kind == "schedule":
            size = call_on_host(self._scheduled, updates)
        else:
            size = call_on_host(
                lambda rows: self._solved(int(rows), num_replicas), rows()
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

    def _scheduled(self, updates):
        with self._keeping_errors():
            size = self.accum_steps(int(updates))
            return check_scheduled(size, int(updates))

    def _followed(self, num_replicas, updates, noise, size, unit):
        with self._keeping_errors():
            low, high = map(float, noise)
            size = self._options.noise_schedule(
                int(updates), low, high, int(size), num_replicas, int(unit)
            )
            if self._options.window_kind == "rows":
                self.accum_steps = size
            return np.int64(size)

    def _solved(self, rows, num_replicas):
        # The epoch's last batch may be short; the first one is not.
        with self._keeping_errors():
            if not self._is_solved:
                self.accum_steps = solve(
                    self._options.effective_batch_size, rows, num_replicas
                )
                self._is_solved = True
            return np.int64(self.accum_steps)

    @contextlib.contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        # TensorFlow would make the error one of its own, with this as text.
        try:
            yield
        except Exception as error:
            self.error = error
            raise

    @contextlib.contextmanager
    def raising_errors(self) -> Iterator[None]:
        """Raises the error of a schedule as it was, not as TensorFlow's."""
        try:
            yield
        except tf.errors.OpError:
            error, self.error = self.error, None
            if error is None:
                raise
            raise error from None


def host_counter(name: str) -> tf.Variable:
    """Makes an int64 scalar variable that starts at 0."""
    return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)


def call_on_host(function: Callable, *values: tf.Tensor) -> tf.Tensor:
    """Calls a Python function of numbers; returns an int64 scalar."""
    called = tf.numpy_function(function, list(values), tf.int64)
    return tf.ensure_shape(called, ())


def solve(effective_batch_size: int, rows: int, num_replicas: int) -> int:
    """Returns how many batches of `rows` rows make an effective batch.

    Raises:
        ValueError: If no whole number of them does.
    """
    accum_steps, rest = divmod(effective_batch_size, rows)
    if rest or not accum_steps:
        raise ValueError(
            "`effective_batch_size` must be a multiple of the rows that a "
            "micro-batch has on each replica, times the replicas. Received: "
            f"effective_batch_size={effective_batch_size}, with "
            f"{rows / num_replicas:g} rows on each of {num_replicas} replicas, "
            f"{rows} together. Choose a multiple of {rows}, or another "
            "`batch_size` in `fit`."
        )
    return accum_steps
