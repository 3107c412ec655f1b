"""How much a micro-batch counts, from its losses, masks and sample weights.

A loss is a numerator over a denominator. The loss of a window is the sum of its
micro-batches' numerators over the sum of their denominators, so a micro-batch
counts by its denominator:

| `Loss.reduction` | denominator |
| --- | --- |
| "sum_over_batch_size", "mean" | number of entries, or of unmasked entries |
| "mean_with_sample_weight" | sum of the sample weights of these |
| "sum", "none", None | there is none: gradients just add up |

Mean of means, the usual way, is off by as much as the denominators differ.
"""

import dataclasses

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum.coupling import Kind

SUM_REDUCTIONS = ("sum", "none", None)

# Where all is masked, the data's gradient is zero, and the regularizers' alone
# is left. This keeps it from a division by zero; beside any other weight it is
# lost in rounding.
LEAST_WEIGHT = 1e-20


@dataclasses.dataclass(frozen=True)
class Denominator:
    """What one loss of one micro-batch is divided by.

    Attributes:
        value: A float scalar.
        source: What the value follows from. Denominators of equal source are
            proportional to each other from micro-batch to micro-batch.
    """

    value: tf.Tensor
    source: tuple


# The source of a denominator that is a constant times the number of rows,
ROWS = ("rows",)
# and that of one which is a guess, or does not exist.
GUESS = ("guess",)


def is_sum(losses) -> bool:
    """Returns whether all losses given to `compile` are sums, not means."""
    leaves = [leaf for leaf in keras.tree.flatten(losses) if leaf is not None]
    return bool(leaves) and all(
        isinstance(leaf, keras.Loss) and leaf.reduction in SUM_REDUCTIONS
        for leaf in leaves
    )


def loss_denominator(
    loss,
    y_true,
    y_pred,
    sample_weight,
    rows,
    kind: Kind | None = None,
    values=None,
):
    """Returns the `Denominator` of one loss, or None if it is a sum.

    Mirrors `keras.Loss.__call__` up to the point where it divides.

    Args:
        loss: A `keras.Loss`. For anything else, and for losses whose `call`
            returns a scalar, the number of rows is the best guess if `kind` is
            not known: most are means.
        y_true: Labels that the loss sees.
        y_pred: Outputs that the loss sees.
        sample_weight: Sample weights that the loss sees, or None.
        rows: Number of rows of the micro-batch.
        kind: What the loss was measured to be; None if that is not known.
        values: What its `call` returned for these; None to call it.
    """
    by_rows = of_rows(rows)
    if kind is Kind.SUM:
        return None
    if kind in (Kind.ROW_MEAN, Kind.COUPLED):
        return by_rows
    # An override of `__call__` may reduce in any way.
    if type(loss).__call__ is not keras.Loss.__call__:
        return by_rows
    if values is None:
        values = loss.call(as_dtype(y_true, loss), as_dtype(y_pred, loss))
    values = tf.convert_to_tensor(values)
    has_sum_reduction = loss.reduction in SUM_REDUCTIONS
    if values.shape.rank == 0:
        # It is reduced already, and `reduction` says nothing. Keras multiplies
        # it by the mean of the sample weights, which no denominator can.
        exact = not has_sum_reduction and sample_weight is None
        return by_rows if exact else dataclasses.replace(by_rows, source=GUESS)
    if has_sum_reduction:
        return None
    masks = [compat.keras_mask(y_pred), compat.keras_mask(values)]
    masks = [mask for mask in masks if mask is not None]
    if not masks and sample_weight is None:
        return Denominator(count(values), shape_source(values))
    mask = masks[0] & masks[1] if len(masks) == 2 else next(iter(masks), None)
    weight = compat.merge_mask(
        None if sample_weight is None else as_dtype(sample_weight, loss),
        mask,
        values.dtype,
        loss.reduction,
    )
    values, weight = compat.align_ranks(values, tf.cast(weight, values.dtype))
    if loss.reduction == "mean_with_sample_weight":
        source = ("weights", ById(sample_weight), *map(ById, masks))
        return Denominator(tf.reduce_sum(as_weight(weight)), source)
    entries = values * weight
    if mask is None:
        return Denominator(count(entries), shape_source(entries))
    # The sum over the unmasked, times total / valid, over all entries.
    repeats = tf.math.divide_no_nan(count(entries), count(mask))
    valid = tf.reduce_sum(as_weight(mask))
    return Denominator(valid * repeats, ("mask", *map(ById, masks)))


def of_rows(rows) -> Denominator:
    """Returns the denominator of a mean over rows."""
    return Denominator(as_weight(rows), ROWS)


def has_guess(denominators) -> bool:
    """Returns whether one of the losses' `Denominator`s is not certain."""
    return any(d is not None and d.source is GUESS for d in denominators)


def total_weight(denominators):
    """Returns the weight of a micro-batch, from its losses' `Denominator`s.

    Returns:
        The sum of the denominators, which is right where they are proportional
        to each other, or None where all of the losses are sums.
    """
    values = [d.value for d in denominators if d is not None]
    if not values:
        return None
    total = tf.add_n(values)
    least = tf.constant(LEAST_WEIGHT, total.dtype)
    return tf.where(tf.equal(total, 0), least, total)


def is_exact(denominators, added=()) -> bool:
    """Returns whether one weight per micro-batch fits all of its losses.

    Args:
        denominators: The `Denominator`s of the losses, None for a sum.
        added: The kinds of losses besides, such as activity regularizers and
            `add_loss`: means over the rows, unless they are known to be sums.
    """
    sources = sources_of(denominators, added)
    return len(sources) <= 1 and GUESS not in sources


def differ(denominators, added=()) -> bool:
    """Returns whether the losses' denominators are not proportional.

    Args:
        denominators: As for `is_exact`.
        added: As for `is_exact`.
    """
    return len(sources_of(denominators, added)) > 1


def sources_of(denominators, added):
    """Returns what the denominators of a micro-batch's losses follow from."""
    sources = {None if d is None else d.source for d in denominators}
    return sources | {None if kind is Kind.SUM else ROWS for kind in added}


def as_dtype(values, loss):
    """Converts `values` to tensors of the loss's dtype, as a loss does."""
    return keras.tree.map_structure(
        lambda value: keras.ops.convert_to_tensor(value, dtype=loss.dtype),
        values,
    )


def as_weight(values):
    """Converts `values` to float64 or float32, whatever Keras's `floatx` is.

    A count must not be rounded: bfloat16 ends at 256.
    """
    is_double = keras.config.floatx() == "float64"
    return tf.cast(values, tf.float64 if is_double else tf.float32)


def count(values):
    """Returns the number of entries of a tensor."""
    return as_weight(tf.size(values))


def shape_source(values):
    """Returns the source of a denominator that is the size of `values`."""
    inner = values.shape[1:]
    return ROWS if inner.is_fully_defined() else ("size", ById(values))


class ById:
    """A key that equals another if both hold the very same object.

    Outputs that share a mask have the same tensor as theirs.
    """

    def __init__(self, value) -> None:
        self._value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, ById) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
