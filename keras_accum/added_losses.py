"""Losses that layers add, and regularizers, where the loss is a sum.

If the loss is a sum over the window, a mean over a micro-batch's rows counts by
their share, and a weight's regularizer once a window.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum.coupling import Kind
from keras_accum.gradients import keep_unless
from keras_accum.microbatch import Microbatch


def counted(
    model: keras.Model,
    losses: list[tf.Tensor],
    microbatch: Microbatch,
    kinds: Sequence[Kind | None] = (),
) -> list[tf.Tensor]:
    """Returns added losses and regularizers, as they count in a micro-batch.

    Args:
        model: The model.
        losses: All of Keras's, the regularizers of weights last.
        microbatch: The micro-batch, of a loss that is a sum.
        kinds: The kinds of the added losses, where they are known.
    """
    count = len(losses) - number_of_regularizers(model)
    added, regularizers = losses[:count], losses[count:]
    if len(kinds) != len(added):
        kinds = [None] * len(added)
    added = [
        times(loss, factor_of(kind, model, microbatch))
        for loss, kind in zip(added, kinds, strict=True)
    ]
    is_first = microbatch.is_first
    if is_first is True or not regularizers:
        return added + regularizers
    if is_first is False:
        return added
    is_later = tf.logical_not(is_first)
    return added + [keep_unless(is_later, loss) for loss in regularizers]


def factor_of(kind, model, microbatch) -> tf.Tensor | int | None:
    """Returns the factor of an added loss of a kind; None for 1."""
    if kind is not Kind.SUM:
        return microbatch.row_share
    # Keras divides it by the number of replicas, as it does with a mean.
    num_replicas = model.distribute_strategy.num_replicas_in_sync
    return None if num_replicas == 1 else num_replicas


def times(loss, factor):
    """Returns a loss times a factor, which is None for 1."""
    return loss if factor is None else loss * tf.cast(factor, loss.dtype)


def number_of_regularizers(model: keras.Model) -> int:
    """Returns how many losses, at their end, regularize weights."""
    return sum(v.regularizer is not None for v in model.trainable_weights)


def regularize_without_rows(model: keras.Model, microbatch: Microbatch) -> None:
    """Computes the share of regularizers that counts without rows as well.

    Weight regularizers of a sum count once a window, in its first micro-batch,
    and each replica counts its share of them.

    Args:
        model: The model.
        microbatch: The micro-batch, of a loss that is a sum.
    """
    count = number_of_regularizers(model)
    if microbatch.counts is None or microbatch.is_first is False or not count:
        return
    with tf.GradientTape() as tape:
        loss = tf.add_n(model.losses[-count:])
        if microbatch.is_first is not True:
            loss = keep_unless(tf.logical_not(microbatch.is_first), loss)
        share = loss / model.distribute_strategy.num_replicas_in_sync
        scaled = model.optimizer.scale_loss(share)
    microbatch.loss_without_rows = loss
    weights = model.trainable_weights
    gradients = tape.gradient(scaled, weights)
    microbatch.gradients_without_rows = dict(
        zip(map(id, weights), gradients, strict=True)
    )
