"""The tensors that have gradients, of all that a call takes and gives."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat


class Outputs:
    """What a function returned, and the losses that layers added in it.

    Args:
        result_and_added: A nested structure; and pairs of a layer and losses.

    Attributes:
        differentiable: The tensors that have gradients: of the result, logits
            that are attached to it, and the losses.
    """

    def __init__(self, result_and_added: tuple) -> None:
        self._result, self._added = result_and_added
        self._leaves = flat(self._result)
        self._places = places_with_gradients(self._leaves)
        self._logits = {
            place: logits
            for place in self._places
            if (logits := compat.cached_logits(self._leaves[place])) is not None
        }
        losses = [loss for _, some in self._added for loss in some]
        self.differentiable = [
            *(self._leaves[place] for place in self._places),
            *self._logits.values(),
            *losses,
        ]
        if not self.differentiable:
            # `tf.custom_gradient` needs something.
            self.differentiable = [tf.zeros(())]

    def filled(self, tensors: Sequence[tf.Tensor]):
        """Returns the result with other tensors; adds the losses of layers.

        Args:
            tensors: As `differentiable`.
        """
        tensors, leaves = iter(keras.tree.flatten(tensors)), list(self._leaves)
        for place in self._places:
            mask = compat.keras_mask(leaves[place])
            leaves[place] = next(tensors)
            if mask is not None:
                compat.set_keras_mask(leaves[place], mask)
        for place in self._logits:
            compat.set_cached_logits(leaves[place], next(tensors))
        for layer, losses in self._added:
            layer.add_loss([next(tensors) for _ in losses])
        return tf.nest.pack_sequence_as(
            self._result, leaves, expand_composites=True
        )


def computed_after(upstream, leaves) -> list:
    """Returns leaves whose tensors are only there when gradients are.

    Else the two calls would be taken for one, whose results are kept. For XLA
    an order says nothing, and it takes barriers away before it looks for what
    is the same: the values must depend on the gradients.

    Args:
        upstream: Tensors.
        leaves: Tensors, and others, which are returned as they are.
    """
    some = tf.reshape(upstream[0], [-1])[:1]
    # Never, and not for NaN either; but no compiler knows that.
    is_beyond = tf.reduce_any(tf.math.real(some) > np.inf)

    def later(leaf):
        if not isinstance(leaf, tf.Tensor):
            return leaf
        if leaf.dtype == tf.bool:
            return tf.logical_or(leaf, is_beyond)
        if leaf.dtype in (tf.string, tf.resource, tf.variant):
            return tf.identity(leaf)
        return leaf + tf.cast(is_beyond, leaf.dtype)

    return list(map(later, leaves))


def flat(structure) -> list:
    """Returns the leaves of a structure, and the tensors of composite ones."""
    return tf.nest.flatten(structure, expand_composites=True)


def places_with_gradients(leaves: Sequence) -> list[int]:
    """Returns which leaves are tensors of floating or complex numbers."""
    return [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, tf.Tensor)
        and (leaf.dtype.is_floating or leaf.dtype.is_complex)
    ]
