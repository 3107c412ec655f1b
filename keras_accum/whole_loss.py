"""The loss of a batch as a whole, as each of its micro-batches needs it."""

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_accum import compat


class WholeLoss(NamedTuple):
    """The loss of a batch, as a micro-batch of it needs it.

    Attributes:
        value: The loss, as Keras reports it; a scalar.
        of_outputs: What Keras reports for each output, if there are several.
        rows: The number of the batch's rows, on all replicas.
        gradients: Of the loss, by what is `differentiable` of this
            micro-batch's outputs, in single precision or wider. Empty in an
            evaluation.
    """

    value: tf.Tensor
    of_outputs: list[tf.Tensor]
    rows: tf.Tensor
    gradients: list[tf.Tensor]


def surrogate(whole: WholeLoss, y_pred) -> tf.Tensor:
    """Returns a scalar whose gradient by the outputs is that of the loss.

    Args:
        whole: The loss of the batch.
        y_pred: The outputs of the micro-batch.
    """
    return tf.add_n(
        [
            tf.reduce_sum(gradient * tf.cast(leaf, gradient.dtype))
            for gradient, leaf in zip(
                whole.gradients, differentiable(y_pred), strict=True
            )
        ]
    )


def differentiable(y_pred) -> list[tf.Tensor]:
    """Returns what a loss may have a gradient by: outputs, and logits.

    Keras's crossentropies go back to the logits that an output was made of.
    """
    leaves = [
        leaf for leaf in keras.tree.flatten(y_pred) if leaf.dtype.is_floating
    ]
    return leaves + [logits for _, logits in all_logits(y_pred)]


def all_logits(y_pred) -> list[tuple[int, tf.Tensor]]:
    """Returns the logits that outputs were made of, and these by index."""
    found = [
        (index, compat.cached_logits(leaf))
        for index, leaf in enumerate(keras.tree.flatten(y_pred))
        # A loss casts half precision, and then finds none.
        if leaf.dtype in (tf.float32, tf.float64)
    ]
    return [(index, logits) for index, logits in found if logits is not None]


def seen_by_loss(model: keras.Model, data) -> tuple:
    """Returns what the loss of a batch looks at: `x`, `y` and sample weights.

    Keras's own `compute_loss` does not look at `x`, which is None then.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if not compat.has_custom_compute_loss(model):
        x = None
    return x, y, sample_weight


def widened(leaf: tf.Tensor) -> tf.Tensor:
    """Returns an output in single precision, if it is in half.

    It is another tensor in any case, without what Keras attaches to outputs.
    """
    is_half = leaf.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(leaf, tf.float32) if is_half else tf.identity(leaf)
