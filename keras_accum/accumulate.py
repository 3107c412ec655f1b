"""`model.accumulate`: a method of models, and what it takes."""

from collections.abc import Iterable
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import building
from keras_accum import microbatch as microbatches
from keras_accum.gradients import Gradient
from keras_accum.gradients import check_lengths

Variable = keras.Variable | tf.Variable
Pair = tuple[Gradient, Variable]
WRITE = (
    "Write `self.accumulate(gradients, weight)`, with one gradient per "
    "trainable weight, or `self.accumulate(zip(gradients, variables), weight)`."
)


def accumulate(  # noqa: D417
    self: keras.Model,
    gradients: Iterable[Gradient | Pair],
    weight: float | tf.Tensor | None = 1.0,
) -> None:
    """Adds gradients to the window.

    A `train_step` of your own calls it in place of
    `self.optimizer.apply_gradients`, any number of times; each call adds
    its gradients and its weight. With `accum_steps=1` it is that call.

    Args:
        gradients: One per trainable weight, in the order of
            `self.trainable_weights`; None where there is none. Or pairs of
            a gradient and its variable, of some of them. Gradients of
            `self.optimizer.scale_loss(loss)`, as in Keras; of a scalar:
            TensorFlow adds a vector's entries up.
        weight: How much they count: the denominator of the loss, for a mean
            the number of rows. A scalar; None if the loss is a sum.

    Raises:
        ValueError: If there are not as many gradients as trainable weights,
            or pairs have another variable, or one twice.
    """
    accumulation = self._accumulation
    check_weight(weight)
    variables = self.trainable_weights
    indices, gradients = by_index(gradients, variables)
    microbatch = microbatches.current(self)
    if not accumulation.is_active and microbatch is None:
        chosen = [variables[index] for index in indices]
        # Built by some of the weights, it would not know the others.
        is_part = len(indices) < len(variables)
        building.build_optimizer_early(self, is_needed=is_part)
        self.optimizer.apply_gradients(zip(gradients, chosen, strict=True))
        return
    microbatch = microbatch or accumulation.new_microbatch()
    accumulation.window["nonfinite"].check(microbatch, gradients)
    gradients = microbatch.gradients_or_nothing(gradients, indices)
    weight = microbatch.or_nothing(weight)
    accumulator, *place = accumulation.window["gradients"].accumulator_for(
        microbatch, indices, weight
    )
    accumulator.add(gradients, weight, *place)
    microbatch.accumulated.append((gradients, weight))


def by_index(
    gradients: Iterable[Gradient | Pair], variables: Sequence[Variable]
) -> tuple[list[int], list[Gradient]]:
    """Returns gradients in the order of variables, and which these are.

    Args:
        gradients: One per variable, or pairs of a gradient and its variable.
        variables: The trainable weights.

    Raises:
        ValueError: If the number of gradients is wrong, or pairs have another
            variable, or one twice.
    """
    if isinstance(gradients, tf.Tensor | keras.Variable | tf.Variable):
        raise ValueError(
            f"`gradients` must be a list. {WRITE} Received: {gradients!r}"
        )
    gradients = list(gradients)
    if not gradients or not all(map(is_pair, gradients)):
        check_lengths(gradients, variables)
        return list(range(len(variables))), gradients
    places = {id(variable): index for index, variable in enumerate(variables)}
    # Keras's variables are also known by the `tf.Variable` within.
    places |= {
        id(variable.value): index
        for index, variable in enumerate(variables)
        if isinstance(variable, keras.Variable)
    }
    by_place = {}
    for gradient, variable in gradients:
        place = places.get(id(variable))
        if place is None:
            raise ValueError(
                "`gradients` must be of variables among "
                f"`model.trainable_weights`. Received: {variable.name}"
            )
        if place in by_place:
            raise ValueError(
                "`gradients` must have each variable once. "
                f"Received: {variable.name} twice"
            )
        by_place[place] = gradient
    indices = sorted(by_place)
    return indices, [by_place[index] for index in indices]


def is_pair(item) -> bool:
    """Returns whether something is a gradient and its variable."""
    return (
        isinstance(item, list | tuple)
        and not isinstance(item, tf.IndexedSlices)
        and len(item) == 2
        and isinstance(item[1], keras.Variable | tf.Variable)
    )


def check_weight(weight) -> None:
    """Raises a `ValueError` if variables are given for a weight."""
    if isinstance(weight, list | tuple) and any(
        isinstance(each, keras.Variable | tf.Variable) for each in weight
    ):
        raise ValueError(
            "`weight` must say how much the micro-batch counts: a scalar, for "
            f"a mean the number of rows. {WRITE} Received: {len(weight)} "
            "variables as `weight`"
        )
