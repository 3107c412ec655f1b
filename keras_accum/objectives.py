"""The losses of a step: what each gathers in a window, and for whose update.

As ordinary code, for a step with calls `j` of `accumulate`:

```python
for optimizer in optimizers:
    gradient = sum(
        sum(w[i][j] * g[i][j] for i in window) / sum(w[i][j] for i in window)
        for j in losses_of(optimizer)
    )
    optimizer.apply(gradient)
```

so that each loss has a mean of its own, as it has in the large batch.
"""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from keras_accum import building
from keras_accum import compat
from keras_accum import ordering
from keras_accum import weighting
from keras_accum.accumulator import GradientAccumulator
from keras_accum.calls import Call
from keras_accum.gradients import add_two

# What a checkpoint calls the sums of an objective that is not the first.
PREFIX = "objective_"

# Optimizer and variables, by `id`, and which of the losses with the same two.
Key = tuple[int, frozenset[int], int]


class Objective:
    """A loss whose gradients a step accumulates, and what a window has of it.

    Args:
        accumulator: What sums them, for its variables.

    Attributes:
        accumulator: As above.
        is_called: Whether a step has ever accumulated any.
        is_optional: Whether a step has ever accumulated none.
    """

    def __init__(self, accumulator: GradientAccumulator) -> None:
        self.accumulator = accumulator
        self.is_called = self.is_optional = False

    @property
    def variables(self) -> list[tf.Variable]:
        """The buffers so far."""
        return [b for b in self.accumulator.buffers if b is not None]

    @property
    def summed(self) -> list[tf.Variable]:
        """Those of them whose sums over replicas are needed: not the maxima."""
        pairs = zip(
            self.accumulator.variables, self.accumulator.buffers, strict=True
        )
        return [
            buffer
            for variable, buffer in pairs
            if buffer is not None and not compat.is_overwritten(variable)
        ]

    def signature(self) -> int:
        """Returns a number that grows where programs no longer fit."""
        return len(self.variables) + self.is_called + self.is_optional


@dataclasses.dataclass(frozen=True)
class Update:
    """What an optimizer does at the end of a window.

    Attributes:
        optimizer: The optimizer.
        variables: What it updates.
        gradients: Dense, one for each; None where no gradient came.
        is_made: Whether there is any; a bool scalar, or None if there is for
            certain. A step may leave out a network's loss, and then no
            optimizer is called for it.
    """

    optimizer: keras.Optimizer
    variables: list[keras.Variable]
    gradients: list[tf.Tensor | None]
    is_made: tf.Tensor | None

    def joined(self, other: "Update") -> "Update":
        """Returns one update of two of the same optimizer."""
        variables, gradients = {}, {}
        for each in (self, other):
            pairs = zip(each.variables, each.gradients, strict=True)
            for variable, gradient in pairs:
                key = id(variable)
                variables[key] = variable
                gradients[key] = add_two(gradients.get(key), gradient)
        is_made = None
        if self.is_made is not None and other.is_made is not None:
            is_made = tf.logical_or(self.is_made, other.is_made)
        return Update(
            self.optimizer,
            list(variables.values()),
            list(gradients.values()),
            is_made,
        )

    def build_optimizer(self) -> None:
        """Makes the optimizer's variables, unless they exist."""
        building.build_optimizer(self.optimizer, self.variables)

    def apply(self) -> None:
        """Calls the optimizer."""
        with ordering.one_after_the_other(self.optimizer):
            self.optimizer.apply_gradients(
                zip(self.gradients, self.variables, strict=True)
            )


def update_of(
    objective: Objective, optimizer: keras.Optimizer, sums, num_replicas: int
) -> Update:
    """Returns the update that an objective alone would make.

    Args:
        objective: The objective.
        optimizer: Its optimizer.
        sums: What the replicas' `sums` add up to.
        num_replicas: The number by which Keras divided the losses.
    """
    weight, *buffers = sums
    accumulator = objective.accumulator
    return Update(
        optimizer,
        accumulator.variables,
        accumulator.mean([weight / num_replicas, *buffers]),
        weight > 0 if objective.is_optional else None,
    )


def joined(updates: Iterable[Update]) -> list[Update]:
    """Returns one update for each optimizer."""
    by_optimizer: dict[int, Update] = {}
    for update in updates:
        key = id(update.optimizer)
        before = by_optimizer.get(key)
        by_optimizer[key] = update if before is None else before.joined(update)
    return list(by_optimizer.values())


def by_loss(calls: Iterable[Call]) -> dict[Key, list[Call]]:
    """Groups the calls of a step by the loss that they are of.

    Losses are told apart by their optimizer, their variables, and the place in
    the code. Of the place, only the order counts: a step that is traced again
    may have other code objects.
    """
    places: dict[tuple, list[tuple]] = {}
    groups: dict[Key, list[Call]] = {}
    for call in calls:
        known = places.setdefault(call.whose, [])
        if call.place not in known:
            known.append(call.place)
        key = *call.whose, known.index(call.place)
        groups.setdefault(key, []).append(call)
    return groups


def weights_of(
    calls: Mapping[Objective, list[Call]], rows: tf.Tensor | None
) -> dict[Objective, tf.Tensor]:
    """Returns what losses count by, where it is not the sum of their weights.

    Calls from different lines are of different losses, unless what they weigh
    adds up to the rows of the micro-batch, as two halves of it do: these are
    parts of one loss, and each is divided by the sum over all.

    Args:
        calls: Those of a micro-batch, by the loss that they are of.
        rows: How many the micro-batch has; None if that is not known.
    """
    alike: dict[tuple, list[Objective]] = {}
    for objective, group in calls.items():
        alike.setdefault(group[0].whose, []).append(objective)
    found = {}
    for some in alike.values():
        weights = [[call.weight for call in calls[each]] for each in some]
        if len(some) == 1 or rows is None or None in sum(weights, []):
            continue
        sums = [
            tf.add_n(list(map(weighting.as_weight, group))) for group in weights
        ]
        total = tf.add_n(sums)
        are_parts = tf.equal(total, tf.cast(rows, total.dtype))
        for objective, own in zip(some, sums, strict=True):
            found[objective] = tf.where(are_parts, total, own)
    return found


def build_optimizers(calls: Iterable[Call], strategy) -> None:
    """Makes the variables of the optimizers of a step, before any update.

    Args:
        calls: The calls of the step.
        strategy: The model's strategy.
    """
    variables: dict[int, dict[int, keras.Variable]] = {}
    for call in calls:
        variables.setdefault(id(call.optimizer), {}).update(
            {id(variable): variable for variable in call.variables}
        )
    for call in calls:
        building.build_optimizer_early(
            strategy,
            call.optimizer,
            list(variables[id(call.optimizer)].values()),
        )


def named_states(
    states: Mapping[int, Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns the states of objectives, given by number, by name."""
    return {
        f"{PREFIX}{number}_{name}": value
        for number, values in states.items()
        for name, value in values.items()
    }


def states_of_others(
    state: Mapping[str, np.ndarray],
) -> dict[int, dict[str, np.ndarray]]:
    """Returns what `named_states` was given."""
    states = {}
    for name, value in state.items():
        if name.startswith(PREFIX):
            number, _, rest = name.removeprefix(PREFIX).partition("_")
            states.setdefault(int(number), {})[rest] = value
    return states
