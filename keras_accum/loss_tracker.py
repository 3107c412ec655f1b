"""The loss that `fit` reports: that of whole windows, not of micro-batches."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


class WindowLoss(keras.metrics.Mean):
    """Mean over the rows seen, of the loss of the window that each was in.

    Keras reports the mean of the batches' losses, weighted by their rows. For
    the same figure a window has to count as one batch, so its numerators and
    denominators are summed apart until it ends:

    ```python
    total += rows * (sum(weight * loss) / sum(weight))
    ```

    Within a window, the micro-batches so far stand for the window.

    Args:
        name: Name of the metric.
        dtype: Dtype of the metric, or None for Keras's default.
    """

    def __init__(self, name: str = "loss", dtype: str | None = None) -> None:
        super().__init__(name=name, dtype=dtype)
        # No variables of the metric: these would show in the model's state.
        with tf.init_scope():
            self._window = tf.Variable(
                tf.zeros((3,), self.dtype), trainable=False
            )
        self._is_holding = False
        self._held = None

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Keeps what `update_state` is given for `add_held`.

        Keras updates the metrics of single outputs while it computes the loss,
        when their denominators are not known yet.
        """
        self._is_holding, self._held = True, None
        try:
            yield
        finally:
            self._is_holding = False

    def update_state(self, values, sample_weight=None) -> None:
        """Adds to the mean, as `keras.metrics.Mean`, or holds back."""
        if self._is_holding:
            self._held = values, sample_weight
        else:
            super().update_state(values, sample_weight)

    def add_held(self, weight: tf.Tensor | None, first) -> None:
        """Adds what was held back, as one micro-batch.

        Args:
            weight: As for `add`.
            first: Whether it is the window's first, as a bool or a tensor.
                Where the number of rows is not known while tracing, Keras
                counts each batch once, and so a window.
        """
        if self._held is None:
            return
        loss, rows = self._held
        self._held = None
        self.add(
            loss, weight, tf.cast(first, tf.int32) if rows is None else rows
        )

    def add(
        self,
        loss: tf.Tensor,
        weight: tf.Tensor | None,
        rows: tf.Tensor,
    ) -> None:
        """Adds one micro-batch to the window.

        Args:
            loss: Its loss; a scalar, or one value per row where the loss's
                reduction is None: Keras reports the mean of these.
            weight: The denominator of its loss; None if the loss is a sum.
            rows: Number of its rows.
        """
        loss, rows = tf.cast(loss, self.dtype), tf.cast(rows, self.dtype)
        if loss.shape.rank != 0:
            loss, weight = tf.reduce_mean(loss), rows
        if weight is None:
            _, weight_so_far, _ = tf.unstack(self._window)
            summands = [loss, tf.ones_like(loss) - weight_so_far, rows]
        else:
            weight = tf.cast(weight, self.dtype)
            summands = [weight * loss, weight, rows]
        self._window.assign_add(tf.stack(summands))

    def close(self) -> None:
        """Ends the window; what comes next belongs to another."""
        total, rows = self._window_total()
        self.total.assign_add(total)
        self.count.assign_add(rows)
        self._window.assign(tf.zeros_like(self._window))

    def reset_state(self) -> None:
        """Forgets all that was seen, in the current window too."""
        super().reset_state()
        self._window.assign(tf.zeros_like(self._window))

    def result(self) -> tf.Tensor:
        """The mean loss; a scalar."""
        total, rows = self._window_total()
        return tf.math.divide_no_nan(self.total + total, self.count + rows)

    def _window_total(self):
        """The window's loss times its rows, and its rows."""
        loss, weight, rows = tf.unstack(self._window)
        return rows * tf.math.divide_no_nan(loss, weight), rows
