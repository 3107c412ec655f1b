"""The losses of a step, each with the sum of its gradients in a window.

The window's mean gradient is `sum(each.factor * each.sums for each in losses)`,
where the factors are known at its end. Its squared norm takes the inner
products of all pairs of losses.
"""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum.calls import Call
from keras_accum.inner_products import inner_product
from keras_accum.microbatch import Microbatch


@dataclasses.dataclass(frozen=True)
class LossSum:
    """The gradients of a loss, as a window summed them over all replicas.

    Attributes:
        optimizer: Whose update they are for.
        factor: What makes them the mean, as the optimizer sees it, without what
            it scales losses by; a float32 scalar.
        sums: By the `id` of the variable.
    """

    optimizer: keras.Optimizer
    factor: tf.Tensor
    sums: dict[int, tf.Tensor]


def squared_norm(losses: Sequence[LossSum], on_cpu: bool) -> tf.Tensor:
    """Returns the squared norm of the mean gradient; a float32 scalar.

    Args:
        losses: Those of the window.
        on_cpu: Whether the sums are on a CPU.
    """

    def product(i, j):
        some, others = common(losses[i].sums, losses[j].sums)
        return inner_product(some, others, on_cpu)

    return bilinear(losses, product)


def bilinear(
    losses: Sequence[LossSum], product: Callable[[int, int], tf.Tensor]
) -> tf.Tensor:
    """Returns the sum over all pairs of losses; a float32 scalar.

    Args:
        losses: Those of the window.
        product: Returns what a pair has, given by index: an inner product.
    """
    terms = [
        (1.0 if i == j else 2.0)
        * product(i, j)
        * losses[i].factor
        * losses[j].factor
        for i, j in pairs(range(len(losses)))
        # The gradients of two optimizers have entries of their own.
        if losses[i].optimizer is losses[j].optimizer
    ]
    return tf.add_n(terms) if terms else tf.zeros(())


def pairs(items) -> Iterator[tuple]:
    """Yields all pairs, also of one with itself, each in one order."""
    return itertools.combinations_with_replacement(items, 2)


def common(some: Mapping, others: Mapping) -> tuple[list, list]:
    """Returns the values that two dicts have of the same keys."""
    keys = [key for key in some if key in others]
    return [some[key] for key in keys], [others[key] for key in keys]


def product_of_calls(
    some: Sequence[Call], others: Sequence[Call], on_cpu: bool
) -> tf.Tensor:
    """Returns the inner product of two sums of weighted gradients.

    Args:
        some: Calls of `accumulate`.
        others: The same, or others.
        on_cpu: As for `inner_product`.
    """
    terms = []
    for one, other in itertools.product(some, others):
        gradients = common(gradients_of(one), gradients_of(other))
        value = inner_product(*gradients, on_cpu)
        for call in (one, other):
            if call.weight is not None:
                value *= tf.cast(call.weight, value.dtype)
        terms.append(value)
    return tf.add_n(terms)


def gradients_of(call: Call) -> dict:
    """Returns the gradients of a call, by the `id` of the variable.

    What overwrites its variable, as in float8 training, is none.
    """
    return {
        id(variable): gradient
        for variable, gradient in zip(
            call.variables, call.gradients, strict=True
        )
        if gradient is not None and not compat.is_overwritten(variable)
    }


def scale_of(optimizer: keras.Optimizer) -> tf.Tensor:
    """Returns what an optimizer multiplies losses by; a float32 scalar."""
    return tf.cast(optimizer.scale_loss(tf.ones(())), tf.float32)


def size_of(microbatch: Microbatch, groups: Sequence) -> tf.Tensor:
    """Returns how much a micro-batch tells; a float32 scalar.

    It is the weight if there is one loss that has one, and else the rows.

    Args:
        microbatch: The micro-batch.
        groups: Its calls of `accumulate`, loss by loss.
    """
    weights = [call.weight for call in groups[0]]
    if microbatch.size is not None and (len(groups) > 1 or None in weights):
        weights = [microbatch.size]
    known = [weight for weight in weights if weight is not None] or [1.0]
    return tf.add_n([tf.cast(weight, tf.float32) for weight in known])
