"""Some rows of a batch, to look at, and what a model makes of them."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import rows as row_counts


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some rows of a batch, and what a model makes of them.

    Attributes:
        x: Inputs: nested tensors, as all others.
        y: Labels, or None.
        y_pred: The model's outputs.
        sample_weight: Sample weights, or None.
    """

    x: object
    y: object
    y_pred: object
    sample_weight: object = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(
            row_counts.number_of_rows(
                self.sample_weight, self.y, self.y_pred, self.x
            )
        )

    def part(self, start: int, stop: int) -> "Sample":
        """Returns the rows from `start` to `stop`, with their masks."""
        taken = [
            None if each is None else row_counts.take(each, start, stop)
            for each in (self.x, self.y, self.y_pred, self.sample_weight)
        ]
        part = Sample(*taken)
        copy_masks(
            self.y_pred,
            part.y_pred,
            lambda mask: row_counts.take(mask, start, stop),
        )
        return part

    def with_other_outputs(self) -> "Sample":
        """Returns the same rows with other outputs, in the same range."""
        rng = np.random.default_rng(0)
        y_pred = tf.nest.map_structure(
            lambda leaf: varied(leaf, rng), self.y_pred
        )
        copy_masks(self.y_pred, y_pred, lambda mask: mask)
        return dataclasses.replace(self, y_pred=y_pred)

    def twice(self) -> "Sample":
        """Returns all rows two times, the second time with other outputs.

        The labels of the second half are zero where they are numbers: padding,
        or background.
        """
        other = self.with_other_outputs()
        both = [
            None if a is None else tf.nest.map_structure(join, a, b)
            for a, b in (
                (self.x, self.x),
                (self.y, half_zero(self.y)),
                (self.y_pred, other.y_pred),
                (self.sample_weight, self.sample_weight),
            )
        ]
        sample = Sample(*both)
        copy_masks(
            self.y_pred,
            sample.y_pred,
            lambda mask: tf.concat([mask, mask], axis=0),
        )
        return sample


def varied(leaf, rng):
    """Returns other values in the range of an output, not equal in all rows."""
    if not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
        return leaf
    values = leaf.numpy()
    factors = np.exp(0.3 * rng.standard_normal(values.shape, "float32"))
    others = np.sign(values) * np.abs(values) ** factors
    sums = values.sum(axis=-1) if values.ndim > 1 else np.zeros(1)
    if np.all(values >= 0) and np.allclose(sums, 1, atol=1e-3):
        others /= others.sum(axis=-1, keepdims=True)
    return tf.cast(others, leaf.dtype)


def half_zero(y):
    """Returns labels of which the second half of each row is zero."""

    def zeroed(leaf):
        if not isinstance(leaf, tf.Tensor) or leaf.dtype == tf.string:
            return leaf
        if leaf.shape.rank < 2:
            return leaf
        length = leaf.shape[1]
        kept = tf.range(length) < (length + 1) // 2
        kept = tf.reshape(kept, [1, length] + [1] * (leaf.shape.rank - 2))
        return tf.where(kept, leaf, tf.zeros_like(leaf))

    return None if y is None else tf.nest.map_structure(zeroed, y)


def join_all(some, others):
    """Returns two batches, one after the other, with their masks."""
    joined = tf.nest.map_structure(join, some, others)
    for leaf, a, b in zip(
        *map(keras.tree.flatten, (joined, some, others)), strict=True
    ):
        masks = [compat.keras_mask(each) for each in (a, b)]
        if all(mask is not None for mask in masks):
            compat.set_keras_mask(leaf, tf.concat(masks, axis=0))
    return joined


def join(some, others):
    """Returns two leaves of a batch, one after the other."""
    if isinstance(some, tf.SparseTensor):
        return tf.sparse.concat(0, [some, others])
    return tf.concat([some, others], axis=0)


def copy_masks(source, target, change: Callable) -> None:
    """Gives the masks of some outputs to others, changed by a function."""
    for some, other in zip(
        keras.tree.flatten(source), keras.tree.flatten(target), strict=True
    ):
        mask = compat.keras_mask(some)
        if mask is not None:
            compat.set_keras_mask(other, change(mask))
