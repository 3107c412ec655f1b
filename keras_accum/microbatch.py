"""The micro-batch that a train step is at work on, in this replica."""

import contextvars
import dataclasses
from collections.abc import Sequence
from typing import Self

import keras
import tensorflow as tf

from keras_accum import compat

# Replicas are traced in threads of their own, each with a context of its own.
_CURRENT = contextvars.ContextVar("keras_accum_microbatch", default=None)


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a layer normalised the channels of its inputs with.

    Attributes:
        layer: The layer.
        number: How many values of a channel there were; a float scalar.
        means: Of the channels.
        variances: Of the channels.
    """

    layer: keras.layers.Layer
    number: tf.Tensor
    means: tf.Tensor
    variances: tf.Tensor


class Microbatch:
    """What a train step and what it calls know of the micro-batch.

    A replica may get no rows, of a last batch that is short. What was computed
    from nothing may be no number; it counts for nothing and changes nothing.

    Args:
        model: The model that trains.
        first: Whether it is the first of its window; None if that is known on
            the device alone.
        has_rows: A bool tensor; None if there are rows for certain.
        totals: What the rows and the denominators of the losses add up to in
            the whole window, on all replicas: a float vector. None if they
            are not known yet, or one weight for the micro-batch is exact.

    Attributes:
        is_finite: Whether its gradients are; a bool tensor. None if that is
            not known yet, or does not matter.
        has_accumulated: Whether gradients were added to the window.
        row_share: With `totals`, how much a mean over the rows counts.
        loss_without_rows: The loss if there are no rows, or none count.
        gradients_without_rows: Its gradients, or None if they are zeros.
        moments: The `Moments` of its calls of layers that normalise over it.
        held: `id`s of the variables that the window's end assigns in its place.
    """

    def __init__(
        self,
        model: keras.Model,
        first: bool | None,
        has_rows: tf.Tensor | None,
        totals: tf.Tensor | None = None,
    ) -> None:
        self.model = model
        self.first = first
        self.has_rows = has_rows
        self.totals = totals
        self.is_finite = None
        self._before = {}
        self._graph = compat.current_graph()
        self.has_accumulated = False
        self.row_share = None
        self.loss_without_rows = tf.zeros(())
        self.gradients_without_rows = None
        self.moments: list[Moments] = []
        self.held: frozenset[int] = frozenset()

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *unused) -> None:
        _CURRENT.reset(self._token)

    @property
    def counts(self) -> tf.Tensor | None:
        """Whether it counts, as far as is known; None if it does."""
        if self.is_finite is None or self.has_rows is None:
            return self.has_rows if self.is_finite is None else self.is_finite
        return tf.logical_and(self.has_rows, self.is_finite)

    def note_state(self, variable: keras.Variable) -> None:
        """Notes what a variable holds that the step is about to assign."""
        # A branch's tensors are not known outside of it.
        if (
            compat.current_graph() is self._graph
            and id(variable) not in self._before
        ):
            self._before[id(variable)] = variable, tf.identity(variable.value)

    def note_finite(self, is_finite: tf.Tensor) -> None:
        """Notes whether the gradients are finite, a bool tensor.

        If not, the variables noted so far get back what they held.
        """
        for variable, before in self._before.values():
            variable.assign(tf.where(is_finite, variable.value, before))
        # Only now: what is assigned is selected by it from here on.
        self.is_finite = is_finite

    def value_or(self, value: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """`value`, or `other` if the micro-batch does not count."""
        counts = self.counts
        if counts is None:
            return value
        value = tf.convert_to_tensor(value)
        return tf.where(counts, value, tf.cast(other, value.dtype))

    def or_nothing(self, value: tf.Tensor) -> tf.Tensor:
        """`value`, or zeros if the micro-batch does not count."""
        if self.counts is None:
            return value
        return self.value_or(value, tf.zeros_like(value))

    def gradients_or_nothing(self, gradients: Sequence) -> list:
        """Gradients of any kind, or those without rows if none count."""
        if self.counts is None:
            return list(gradients)
        others = self.gradients_without_rows or [None] * len(gradients)
        if self.is_finite is not None:
            return self._selected(gradients, others)
        pairs = [
            (values_of(gradient), other)
            for gradient, other in zip(gradients, others, strict=True)
            if gradient is not None
        ]
        tensors = [tensor for tensor, _ in pairs]
        # No pass over the memory, as `tf.where` would make.
        chosen = iter(
            tf.cond(
                self.has_rows,
                lambda: tensors,
                lambda: [
                    tf.zeros_like(tensor)
                    if other is None
                    else tf.cast(values_of(other), tensor.dtype)
                    for tensor, other in pairs
                ],
            )
            if tensors
            else []
        )
        return [
            with_values(gradient, next(chosen))
            if gradient is not None
            else None
            for gradient in gradients
        ]

    def _selected(self, gradients, others):
        # XLA selects while it adds to the buffers; a `tf.cond` comes between.
        return [
            None
            if gradient is None
            else with_values(
                gradient,
                self.or_nothing(values_of(gradient))
                if other is None
                else self.value_or(values_of(gradient), values_of(other)),
            )
            for gradient, other in zip(gradients, others, strict=True)
        ]


def current(model: keras.Model) -> Microbatch | None:
    """The micro-batch that `model` is at work on, in this thread, if any."""
    now = _CURRENT.get()
    return now if now is not None and now.model is model else None


def has_rows(data) -> tf.Tensor | None:
    """Whether a batch has rows; None if it does for certain."""
    leaves = [leaf for leaf in keras.tree.flatten(data) if is_batched(leaf)]
    if not leaves:
        return None
    number = tf.shape(leaves[0])[0]
    known = tf.get_static_value(number)
    return None if known is not None and known > 0 else number > 0


def is_batched(leaf):
    """Whether a leaf of a batch has a first dimension."""
    shape = getattr(leaf, "shape", None)
    return shape is not None and len(shape) > 0


def values_of(gradient):
    """The values of a gradient, of all rows or of some."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient.values
    return tf.convert_to_tensor(gradient)


def with_values(gradient, values):
    """A gradient of the same kind with other values."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values
