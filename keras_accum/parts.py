"""Parts of a loss, each of which has a denominator of its own.

A loss adds up what `compile` was given and what layers add. Where the
denominators of these are not proportional, no weight of a micro-batch fits all,
and its batch is not known yet. So each part has its gradients, which take one
backward pass, and its sums in the window.
"""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import weighting
from keras_accum.annotations import Gradient
from keras_accum.weighting import Denominator


class Terms:
    """What a loss of a micro-batch adds up, recorded while it is computed.

    Args:
        tape: What it is computed with; persistent.

    Attributes:
        tape: As above.
        compiled: What losses given to `compile` return, before loss weights.
        added: What layers add; after these the regularizers.
    """

    def __init__(self, tape: tf.GradientTape) -> None:
        self.tape = tape
        self.compiled: list[tf.Tensor] = []
        self.added: list[tf.Tensor] = []

    def record_compiled(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns what a loss has returned, to go on with."""
        self.compiled.append(self._watched(loss))
        return self.compiled[-1]

    def record_added(self, losses: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns what layers add, to go on with."""
        self.added = list(map(self._watched, losses))
        return self.added

    def _watched(self, loss):
        # Two losses may be the same tensor, or depend on no weight.
        loss = tf.identity(loss)
        self.tape.watch(loss)
        return loss


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a loss, or all of it.

    Attributes:
        loss: Its value, as Keras scales it for replicas.
        weight: How much it counts; None if it is a sum.
        targets: What to take the gradient of.
        factors: What each of these is multiplied by; None for 1.
    """

    loss: tf.Tensor
    weight: tf.Tensor | None
    targets: list[tf.Tensor] = dataclasses.field(default_factory=list)
    factors: list[tf.Tensor] | None = None

    def gradients(
        self, tape: tf.GradientTape, variables: Sequence[keras.Variable]
    ) -> list[Gradient]:
        """Returns its gradients, as the optimizer scales them."""
        if not self.targets:
            return [None] * len(variables)
        return tape.gradient(
            self.targets, variables, output_gradients=self.factors
        )


def apart(
    terms: Terms,
    loss: tf.Tensor,
    scaled_loss: tf.Tensor,
    divisors: Sequence[Denominator | None],
    num_replicas: int,
) -> list[Part]:
    """Takes a loss apart.

    Args:
        terms: What the loss adds up.
        loss: The loss; a scalar.
        scaled_loss: As the optimizer scales it.
        divisors: What each term but the regularizers is divided by; None for
            sums. They are not all of one source.
        num_replicas: By how much Keras has divided sums that layers add.

    Returns:
        The parts, that of the sums last. The first has the regularizers: where
        there are means, each micro-batch has all of them.
    """
    values = [*terms.compiled, *terms.added]
    # The loss is linear in them.
    factors = terms.tape.gradient(loss, values)
    (scale,) = terms.tape.gradient(scaled_loss, [loss])
    groups = grouped(divisors)
    for index in groups.get(None, []):
        if index >= len(terms.compiled):
            factors[index] *= num_replicas
    regularizers = range(len(divisors), len(values))
    found = []
    for indices in groups.values():
        weight = weighting.total_weight([divisors[i] for i in indices])
        if not found:
            indices = [*indices, *regularizers]
        found.append(
            Part(
                total(loss, [factors[i] * values[i] for i in indices]),
                weight,
                [values[i] for i in indices],
                [times(factors[i], scale) for i in indices],
            )
        )
    return found


def times(factor: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns a factor times a scalar of any dtype."""
    return factor * tf.cast(scale, factor.dtype)


def total(loss: tf.Tensor, shares: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns a sum of tensors of any shape, of the dtype of a loss."""
    sums = [tf.cast(tf.reduce_sum(each), loss.dtype) for each in shares]
    return tf.add_n([tf.zeros_like(loss), *sums])


def grouped(
    divisors: Sequence[Denominator | None],
) -> dict[tuple | None, list[int]]:
    """Returns the indices of divisors by their source, of sums at the end."""
    groups: dict[tuple | None, list[int]] = {}
    for index, divisor in enumerate(divisors):
        if divisor is not None:
            groups.setdefault(divisor.source, []).append(index)
    sums = [i for i, divisor in enumerate(divisors) if divisor is None]
    return groups | ({None: sums} if sums else {})
