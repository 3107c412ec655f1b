"""What a call of `accumulate` was given: gradients of variables, for whom.

It takes what `apply_gradients` takes, pairs of some variables in any order, or
the gradients of all trainable weights in theirs.
"""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Self

import keras
import tensorflow as tf

from keras_accum.annotations import Gradient
from keras_accum.gradients import add_two
from keras_accum.gradients import as_gradient
from keras_accum.gradients import check_lengths
from keras_accum.gradients import check_shapes
from keras_accum.gradients import check_weight
from keras_accum.gradients import values_of
from keras_accum.origins import Origins

# What to write where gradients are not those of all weights in their order.
PAIRS = (
    " For those of some variables, or in another order, write "
    "`accumulate(zip(gradients, variables), weight)`."
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `accumulate`.

    Attributes:
        optimizer: Whose update the gradients are for.
        variables: What they belong to, each of them once.
        gradients: One for each.
        weight: How much they count; None if the loss is a sum.
        place: Where in the step's code it is; the same for all calls of a loop.
        without_rows: What the gradients are if there are no rows; None for
            zeros.
    """

    optimizer: keras.Optimizer
    variables: list[keras.Variable]
    gradients: list[Gradient]
    weight: float | tf.Tensor | None
    place: tuple = ()
    without_rows: list[Gradient] = dataclasses.field(default_factory=list)

    def apply(self) -> None:
        """Updates at once, as the call would be without accumulation."""
        self.optimizer.apply_gradients(
            zip(self.gradients, self.variables, strict=True)
        )

    @property
    def whose(self) -> tuple[int, frozenset[int]]:
        """Its optimizer and its variables, by `id`."""
        return id(self.optimizer), frozenset(map(id, self.variables))

    def values(self) -> list[tf.Tensor]:
        """Returns the values of its gradients."""
        return [values_of(each) for each in self.gradients if each is not None]

    def placed(
        self, place: tuple, without_rows: Mapping[int, Gradient]
    ) -> Self:
        """Returns it with what only a step knows.

        Args:
            place: As above.
            without_rows: As above, by the `id` of the variable.
        """
        gradients = [without_rows.get(id(v)) for v in self.variables]
        return dataclasses.replace(self, place=place, without_rows=gradients)


def make_call(
    model: keras.Model,
    gradients: Iterable,
    weight: float | tf.Tensor | None,
    optimizer: keras.Optimizer | None = None,
    origins: Origins | None = None,
) -> Call:
    """Returns what a model's `accumulate` was given, or raises an error.

    Args:
        model: The model.
        gradients: As for `accumulate`.
        weight: As for `accumulate`.
        optimizer: As for `accumulate`.
        origins: What gradients are of, in a step; None if nobody has looked.
    """
    check_is_no_variable(weight)
    optimizer = check_is_optimizer(model, optimizer)
    entries, trainable = list(gradients), model.trainable_weights
    if any(map(is_pair, entries)):
        gradients, variables = of_pairs(entries, trainable)
    else:
        check_lengths(entries, trainable, PAIRS)
        if origins is not None:
            entries = origins.in_order(entries, trainable)
        gradients, variables = list(map(as_gradient, entries)), trainable
    check_shapes(gradients, variables)
    check_weight(weight)
    return Call(optimizer, variables, gradients, weight)


def of_pairs(pairs, trainable) -> tuple[list[Gradient], list[keras.Variable]]:
    """Returns gradients and variables, as two lists in the same order.

    It is that of the pairs; for pairs of all trainable weights, theirs.

    Args:
        pairs: Of gradients and variables.
        trainable: The model's trainable weights.
    """
    known = {id(variable): variable for variable in trainable}
    known |= {id(variable.value): variable for variable in trainable}
    sums = {}
    for pair in pairs:
        gradient, variable = check_is_pair(pair)
        variable = known.get(id(variable))
        if variable is None:
            raise ValueError(
                "`gradients` must be of the model's trainable weights. "
                f"Received: one of {name_of(pair[1])}, which is not among "
                "them. What the model is to train, such as a second network, "
                "must be its attribute; and what is not `trainable` has no "
                "gradient to accumulate."
            )
        # Keras would update it once with each.
        sums[id(variable)] = add_two(
            sums.get(id(variable)), as_gradient(gradient)
        )
    variables = [known[key] for key in sums]
    if len(variables) == len(trainable):
        variables = trainable
    return [sums[id(variable)] for variable in variables], variables


def is_variable(value) -> bool:
    """Returns whether a value is a variable, of Keras or TensorFlow."""
    return isinstance(value, (keras.Variable, tf.Variable))


def is_pair(entry) -> bool:
    """Returns whether an entry is meant as a pair with a variable."""
    return isinstance(entry, (tuple, list)) and any(map(is_variable, entry))


def check_is_pair(pair) -> tuple:
    """Returns a pair, or raises unless it is of a gradient and a variable."""
    if is_pair(pair) and len(pair) == 2 and not is_variable(pair[0]):
        return tuple(pair)
    raise TypeError(
        "`gradients` must be pairs of a gradient and its variable, as in "
        "`accumulate(zip(gradients, variables), weight)`, or gradients alone. "
        f"Received: {pair!r}"
    )


def check_is_no_variable(weight) -> None:
    """Raises a `TypeError` if `weight` is what `apply` would take there."""
    is_list = isinstance(weight, (tuple, list))
    if isinstance(weight, keras.Optimizer) or (
        any(map(is_variable, weight)) if is_list else is_variable(weight)
    ):
        raise TypeError(
            "`weight` must say how much the gradients count, such as the "
            "number of rows. In place of `optimizer.apply(gradients, "
            "variables)` write `accumulate(zip(gradients, variables), weight, "
            f"optimizer=optimizer)`. Received: a {type(weight).__name__} "
            f"{'of variables' if is_list else ''}".rstrip()
        )


def check_is_optimizer(model, optimizer) -> keras.Optimizer:
    """Returns the optimizer, or the model's; raises if there is none."""
    if optimizer is None:
        optimizer = model.optimizer
        if optimizer is None:
            raise ValueError(
                "`accumulate` needs an optimizer. Give one to `compile`, or "
                "write `accumulate(..., optimizer=self.my_optimizer)`."
            )
    if not isinstance(optimizer, keras.Optimizer):
        raise TypeError(
            "`optimizer` must be a `keras.Optimizer`. "
            f"Received: optimizer={optimizer!r}"
        )
    return optimizer


def name_of(variable) -> str:
    """Returns what an error calls a variable."""
    return getattr(variable, "path", None) or variable.name
