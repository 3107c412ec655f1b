"""What the gradients of a step are of, as far as its tapes have shown."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum.annotations import Gradient


class Origins:
    """What each gradient is of: which variable, and what kind of loss.

    A gradient that was computed with after the tape, such as a clipped one, is
    not known.
    """

    def __init__(self) -> None:
        # By the `id` of the gradient, which is kept, and so its `id`.
        self._known: dict[int, tuple[Gradient, int, bool]] = {}

    def record(self, target, sources, gradients) -> None:
        """Records what a tape was asked for, and what it returned."""
        is_vector = any(
            isinstance(each, tf.Tensor) and each.shape.num_elements() != 1
            for each in tf.nest.flatten(target)
        )
        pairs = zip(
            tf.nest.flatten(sources), tf.nest.flatten(gradients), strict=True
        )
        for source, gradient in pairs:
            if gradient is not None:
                self._known[id(gradient)] = gradient, id(source), is_vector

    def in_order(
        self, gradients: Sequence, variables: Sequence[keras.Variable]
    ) -> list:
        """Returns gradients in the order of variables, if theirs is known.

        Args:
            gradients: One for each variable, maybe None.
            variables: The variables.
        """
        places = {id(v): place for place, v in enumerate(variables)}
        places |= {id(v.value): place for place, v in enumerate(variables)}
        ordered = [None] * len(variables)
        given = [gradient for gradient in gradients if gradient is not None]
        for gradient in given:
            _, source, _ = self._known.get(id(gradient), (None, None, None))
            place = places.get(source)
            if place is None or ordered[place] is not None:
                return list(gradients)
            ordered[place] = gradient
        return ordered

    def is_of_vector(self, gradients: Sequence) -> bool:
        """Returns whether one is of a loss with several values."""
        known = (self._known.get(id(gradient)) for gradient in gradients)
        return any(each is not None and each[2] for each in known)
