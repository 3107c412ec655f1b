"""The loss that `fit` reports: that of whole windows, not of micro-batches."""

import contextlib
import contextvars
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import replicas

# Where metrics record, by their `id`s. Keras's `compute_loss` stands between
# who sets it and the metrics; replicas are traced in threads of their own.
_RECORDED = contextvars.ContextVar("keras_accum_recorded", default={})  # noqa: B039


class WindowLoss(keras.metrics.Mean):
    """Mean over the rows seen, of the loss of the window that each was in.

    Keras reports the mean of the batches' losses, weighted by their rows. For
    the same figure a window has to count as one batch, so its numerators and
    denominators are summed apart until it ends:

    ```python
    total += rows * (sum(weight * loss) / sum(weight))
    ```

    Within a window, the micro-batches so far stand for the window. A loss may
    come in parts, each with a weight of its own; the parts' means add up.

    Attributes:
        windows: The sums of `weight * loss` and `weight` in this window, of
            each part so far; of the first also those of `rows`. Float vectors.
            Each replica has its own.

    Args:
        name: Name of the metric.
        dtype: Dtype of the metric, or None for Keras's default.
    """

    def __init__(self, name: str = "loss", dtype: str | None = None) -> None:
        super().__init__(name=name, dtype=dtype)
        # No variables of the metric: these would show in the model's state.
        with tf.init_scope():
            window = replicas.sum_variable(tf.zeros((3,), self.dtype), "window")
        self.windows: list[tf.Variable] = [window]

    @contextlib.contextmanager
    def recording(self, recorded: dict[int, tuple]) -> Iterator[None]:
        """Records what `update_state` is given, by the metric's `id`.

        Keras updates the metrics of single outputs while it computes the loss,
        when their denominators are not known yet.
        """
        before = _RECORDED.get()
        token = _RECORDED.set(before | {id(self): recorded})
        try:
            yield
        finally:
            _RECORDED.reset(token)

    def update_state(self, values, sample_weight=None) -> None:
        """Adds to the mean, as `keras.metrics.Mean`, or only records."""
        recorded = _RECORDED.get().get(id(self))
        if recorded is not None:
            recorded[id(self)] = values, sample_weight
        else:
            super().update_state(values, sample_weight)

    def add(
        self,
        loss: tf.Tensor,
        weight: tf.Tensor | None,
        rows: tf.Tensor,
        is_weighted: bool = False,
        index: int = 0,
    ) -> None:
        """Adds one micro-batch to the window, or a part of its loss.

        Args:
            loss: Its loss; a scalar, or one value per row where the loss's
                reduction is None: Keras reports the mean of these.
            weight: The denominator of its loss; None if the loss is a sum.
            rows: Number of its rows.
            is_weighted: Whether `loss` is multiplied by `weight` already.
            index: Which part of the loss it is, if there are several. The rows
                are counted with the first.
        """
        window = self.window_of(index)
        loss, rows = tf.cast(loss, self.dtype), tf.cast(rows, self.dtype)
        if loss.shape.rank != 0:
            # Keras also leaves it so where it knows that there are no rows.
            entries = tf.cast(tf.size(loss), self.dtype)
            loss = tf.math.divide_no_nan(tf.reduce_sum(loss), entries)
            weight = rows
        if weight is None:
            weight_so_far = tf.unstack(window)[1]
            summands = [loss, tf.ones_like(loss) - weight_so_far, rows]
        else:
            weight = tf.cast(weight, self.dtype)
            loss = loss if is_weighted else weight * loss
            summands = [loss, weight, rows]
        window.assign_add(tf.stack(summands[: window.shape[0]]))

    def window_of(self, index: int) -> tf.Variable:
        """Returns the sums of a part of the loss, and makes them if need be."""
        strategy = replicas.strategy_of(self.windows)
        while len(self.windows) <= index:
            self.windows.append(
                replicas.on_each(
                    strategy,
                    lambda: replicas.sum_variable(
                        tf.zeros((2,), self.dtype), "window"
                    ),
                )
            )
        return self.windows[index]

    def close(
        self, windows: Sequence[tf.Tensor] | None = None, share=1.0
    ) -> None:
        """Ends the window; what comes next belongs to another.

        Args:
            windows: The sums of all replicas' `windows`, if there are several.
            share: The share of them that this replica counts.
        """
        total, rows = window_total(windows or self.windows)
        self.total.assign_add(share * total)
        self.count.assign_add(share * rows)
        self._forget_window()

    def close_copies(self, strategy: tf.distribute.Strategy) -> None:
        """Ends the window as `close`, on each of this worker's replicas alone.

        For the host, which asks no other worker.
        """
        for total, count, *windows in zip(
            *(
                replicas.copies(strategy, variable)
                for variable in (
                    self.total.value,
                    self.count.value,
                    *self.windows,
                )
            ),
            strict=True,
        ):
            summand, rows = window_total(windows)
            total.assign_add(summand)
            count.assign_add(rows)
            for window in windows:
                window.assign(tf.zeros_like(window))

    def add_window_to(
        self, totals: dict[int, tf.Tensor], windows: Sequence[tf.Tensor]
    ) -> None:
        """Adds the window to values of the variables, as `close` to these.

        Args:
            totals: Values of the metric's variables, by the variables' `id`.
            windows: Values of `windows`.
        """
        total, rows = window_total(windows)
        totals[id(self.total)] += total
        totals[id(self.count)] += rows

    def reset_state(self) -> None:
        """Forgets all that was seen, in the current window too."""
        super().reset_state()
        self._forget_window()

    def result(self) -> tf.Tensor:
        """Returns the mean loss; a scalar."""
        total, rows = window_total(self.windows)
        return tf.math.divide_no_nan(self.total + total, self.count + rows)

    def _forget_window(self):
        for window in self.windows:
            window.assign(tf.zeros_like(window))


def window_total(windows: Sequence) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a window's loss times its rows, and its rows."""
    (total, weight, rows), *others = map(tf.unstack, windows)
    loss = tf.math.divide_no_nan(total, weight)
    for total, weight in others:
        loss += tf.math.divide_no_nan(total, weight)
    return rows * loss, rows
