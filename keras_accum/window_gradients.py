"""The gradients of a model's trainable weights, as a part of its window."""

import functools
import itertools
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum.accumulator import GradientAccumulator
from keras_accum.microbatch import Microbatch
from keras_accum.microbatch import is_same
from keras_accum.window import Part


class Gradients(Part):
    """The sums of the gradients of a model's trainable weights.

    A step may give gradients of some variables alone, with a weight of their
    own. Each set of variables has its sums then, and a variable's mean is what
    all sets that it is in have gathered, over what these weigh.

    Args:
        model: The model.
        dtype: As for `GradientAccumulator`.

    Attributes:
        accumulator: What sums the gradients of all; None before the first.
        dtype: As above.
        has_several_calls: Whether a step adds gradients in several calls: one
            that fails may have added some of them.
    """

    def __init__(self, model: keras.Model, dtype: str | None) -> None:
        self.accumulator: GradientAccumulator | None = None
        self._model, self.dtype = model, dtype
        # By the indices of the variables among all.
        self._subsets: dict[tuple[int, ...], GradientAccumulator] = {}
        # Sets whose gradients are of sums: they have no weight.
        self._of_sums: set[tuple[int, ...]] = set()
        self.has_several_calls = False

    @property
    def variables(self) -> list[tf.Variable]:
        """The buffers so far."""
        if self.accumulator is None:
            return []
        return [
            buffer
            for accumulator in self._accumulators
            for buffer in accumulator.buffers
            if buffer is not None
        ]

    @property
    def _accumulators(self) -> list[GradientAccumulator]:
        return [self.make_accumulator(), *self._subsets.values()]

    def make_accumulator(self) -> GradientAccumulator:
        """Returns an accumulator for the weights that are trainable."""
        variables, made = self._model.trainable_weights, self.accumulator
        # A layer may have been built, or frozen, since the last call.
        if made is None or not is_same(made.variables, variables):
            self.accumulator = GradientAccumulator(variables, self.dtype)
            self._subsets = {}
        return self.accumulator

    def accumulator_for(
        self, microbatch: Microbatch, indices: Sequence[int], weight
    ) -> tuple[GradientAccumulator, bool | tf.Tensor, bool]:
        """Returns what sums gradients of some variables, or of all.

        Args:
            microbatch: The micro-batch that they are of. It is counted once.
            indices: Which of the trainable weights they belong to.
            weight: How much they count, as for `GradientAccumulator.add`.

        Returns:
            The accumulator, and `first` and `counts` for its `add`.
        """
        everything = self.make_accumulator()
        if weight is None:
            self._of_sums.add(tuple(indices))
        # What comes after the first call of a step adds to it.
        counts, is_first = not microbatch.accumulated, microbatch.is_first
        self.has_several_calls |= not counts
        if list(indices) == list(range(len(everything))):
            return everything, is_first if counts else False, counts
        if counts:
            nothing = None if weight is None else 0.0
            everything.add([None] * len(everything), nothing, is_first)
        # Its buffers were zero when the window began.
        return self._subset(tuple(indices)), False, True

    def _subset(self, indices: tuple[int, ...]) -> GradientAccumulator:
        if indices not in self._subsets:
            variables = self.make_accumulator().variables
            self._subsets[indices] = GradientAccumulator(
                [variables[index] for index in indices], self.dtype
            )
        return self._subsets[indices]

    @property
    def num_microbatches(self) -> int:
        """How many there are in the window so far."""
        return (
            0
            if self.accumulator is None
            else int(self.accumulator.count.numpy())
        )

    def is_empty(self) -> tf.Tensor:
        """Returns whether the window has no micro-batch yet; a bool scalar."""
        return tf.equal(self.make_accumulator().count, 0)

    def sums(self) -> list[tf.Tensor | tf.Variable]:
        """Returns the weights and the buffers."""
        return [each for a in self._accumulators for each in a.sums()]

    def mean(self, totals: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
        """Returns the gradients of the window's loss.

        Args:
            totals: What the replicas' `sums` add up to.
        """
        totals, everything = iter(totals), self.make_accumulator()
        summed, found = ([[] for _ in everything.variables] for _ in range(2))
        sets = {tuple(range(len(everything))): everything, **self._subsets}
        for indices, accumulator in sets.items():
            weight, *buffers = itertools.islice(totals, len(accumulator.sums()))
            # Keras divides losses by the number of replicas.
            weight = weight / self._num_replicas
            means = accumulator.mean([weight, *buffers])
            if not self._subsets:
                return means
            for index, mean in zip(indices, means, strict=True):
                if mean is None:
                    continue
                if indices in self._of_sums:
                    summed[index].append(mean)
                else:
                    found[index].append((mean, weight))
        return list(map(merged, everything.variables, summed, found))

    def close(self, totals, applies) -> None:
        """Leaves the buffers to the next micro-batch, which starts them."""
        self.make_accumulator().forget()
        self.reset_subsets()

    def reset(self) -> None:
        """Forgets what was gathered."""
        if self.accumulator is not None:
            self.accumulator.forget()
        self.reset_subsets()

    def reset_subsets(self) -> None:
        """Sets the sums of subsets to zero: no micro-batch starts them."""
        for accumulator in self._subsets.values():
            accumulator.reset()

    def state(self) -> dict[str, np.ndarray]:
        """Returns the weights, the counts and the buffers."""
        # As it stands: a layer may be frozen while it is saved.
        state = self.accumulator.state(self._num_replicas)
        for indices, accumulator in self._subsets.items():
            prefix = prefix_of(indices)
            of_subset = accumulator.state(self._num_replicas)
            state |= {prefix + name: v for name, v in of_subset.items()}
        return state

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless the variables are the same."""
        self.make_accumulator().check_state(state)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the buffers that `state` returned."""
        self.make_accumulator().restore(state, self._num_replicas)
        self.reset_subsets()
        for indices, of_subset in subsets_in(state).items():
            self._subset(indices).restore(of_subset, self._num_replicas)

    @property
    def _num_replicas(self):
        return self._model.distribute_strategy.num_replicas_in_sync


def merged(variable, sums: Sequence, pairs: Sequence) -> tf.Tensor | None:
    """Returns a variable's gradient, out of those of several sets.

    Args:
        variable: The variable.
        sums: Gradients of losses that are sums.
        pairs: The other sets' means, each with what it weighs.
    """
    means = [mean for mean, _ in pairs]
    if not means and not sums:
        return None
    if compat.is_overwritten(variable):
        return functools.reduce(tf.maximum, [*sums, *means])
    total = tf.add_n([weight for _, weight in pairs]) if pairs else None
    return tf.add_n(
        [
            *sums,
            *(
                mean * tf.cast(tf.math.divide_no_nan(weight, total), mean.dtype)
                for mean, weight in pairs
            ),
        ]
    )


def prefix_of(indices: Sequence[int]) -> str:
    """Returns how the names of a subset begin in a checkpoint."""
    return "subset_" + "-".join(map(str, indices)) + "_"


def subsets_in(state: Mapping[str, np.ndarray]) -> dict[tuple, dict]:
    """Returns the states of subsets, by their indices."""
    found = {}
    for name, value in state.items():
        if name.startswith("subset_"):
            _, indices, rest = name.split("_", 2)
            key = tuple(map(int, indices.split("-")))
            found.setdefault(key, {})[rest] = value
    return found
