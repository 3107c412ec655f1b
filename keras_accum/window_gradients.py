"""The gradients of a model's trainable weights, as a part of its window."""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import objectives
from keras_accum import replicas
from keras_accum.accumulator import GradientAccumulator
from keras_accum.calls import Call
from keras_accum.control_flow import after_all_ops
from keras_accum.microbatch import Microbatch
from keras_accum.microbatch import is_same
from keras_accum.objectives import Objective
from keras_accum.objectives import Update
from keras_accum.options import Options
from keras_accum.window import Part


class Gradients(Part):
    """The sums of the gradients of a model's trainable weights.

    The first objective is there always: of the model's own optimizer, and all
    trainable weights. It counts the micro-batches. A step that accumulates for
    other optimizers, for some of the weights, or several losses has others.

    Args:
        model: The model.
        options: Its options.

    Attributes:
        options: As above.
    """

    def __init__(self, model: keras.Model, options: Options) -> None:
        self._model, self.options = model, options
        self._first: Objective | None = None
        # With their optimizers, in the order in which steps showed them.
        self._others: dict[
            objectives.Key, tuple[Objective, keras.Optimizer]
        ] = {}
        # What a checkpoint had of others that no step has shown yet, by number.
        self._restored: dict[int, dict[str, np.ndarray]] = {}

    @property
    def accumulator(self) -> GradientAccumulator | None:
        """What sums the first objective's; None before any."""
        return None if self._first is None else self._first.accumulator

    @property
    def objectives(self) -> list[tuple[Objective, keras.Optimizer]]:
        """The objectives so far, each with the optimizer that it is for."""
        first = [(self._first, self._model.optimizer)] if self._first else []
        return first + list(self._others.values())

    @property
    def _objectives(self):
        return [objective for objective, _ in self.objectives]

    @property
    def variables(self) -> list[tf.Variable]:
        """The buffers so far."""
        return [v for each in self._objectives for v in each.variables]

    @property
    def summed(self) -> list[tf.Variable]:
        """The buffers whose sums the window needs, over all replicas.

        Of others, as in float8 training, it needs the maximum.
        """
        self.make_accumulator()
        return [v for each in self._objectives for v in each.summed]

    def signature(self) -> int:
        """Returns a number that grows where programs no longer fit."""
        return sum(each.signature() for each in self._objectives)

    def make_accumulator(self) -> GradientAccumulator:
        """Returns the first objective's, for the weights that are trainable."""
        variables, made = self._model.trainable_weights, self._first
        # A layer may have been built, or frozen, since the last call.
        if made is None or not is_same(made.accumulator.variables, variables):
            self.forget_objectives()
            self._first = Objective(self._accumulator_of(variables))
        return self._first.accumulator

    def _accumulator_of(self, variables):
        return GradientAccumulator(variables, self.options.accumulator_dtype)

    def forget_objectives(self) -> None:
        """Forgets all but the first: there may be other optimizers."""
        self._others.clear()

    @property
    def num_microbatches(self) -> int:
        """How many there are in the window so far."""
        if self.accumulator is None:
            return 0
        return int(self.accumulator.count.numpy())

    def is_empty(self) -> tf.Tensor:
        """Returns whether the window has no micro-batch yet; a bool scalar."""
        return tf.equal(self.make_accumulator().count, 0)

    @property
    def has_optimizers(self) -> bool:
        """Whether a step has shown whose updates it is for."""
        return any(each.is_called for each in self._objectives)

    def updates_so_far(self) -> tf.Variable:
        """Returns how often the window's update was made: an int scalar.

        If the step leaves the model's own optimizer alone, it is the first of
        the others that counts.
        """
        optimizer = self._model.optimizer
        if self._others and not self._first.is_called:
            _, optimizer = next(iter(self._others.values()))
        return compat.iterations(optimizer)

    def add(self, microbatch: Microbatch) -> None:
        """Adds the gradients that a step accumulated."""
        if not microbatch.calls:
            return
        # It counts the micro-batches, and is asked before it has counted this.
        first = microbatch.is_first
        calls = self.find(microbatch)
        # All or none: also what needs no gradient, such as the count of
        # micro-batches, needs the batch.
        waits = len(self._objectives) > 1
        weights = objectives.weights_of(calls, microbatch.rows)
        values = [value for call in microbatch.calls for value in call.values()]
        with tf.control_dependencies(after_all_ops(values) if waits else []):
            for objective in self._objectives:
                objective.is_optional |= objective not in calls
                parts = [
                    (
                        microbatch.gradients_or_nothing(call),
                        microbatch.or_nothing(call.weight),
                    )
                    for call in calls.get(objective, [])
                ]
                total = microbatch.or_nothing(weights.get(objective))
                objective.accumulator.add_microbatch(
                    parts, first, total, waits=not microbatch.is_of_batch
                )

    def find(self, microbatch: Microbatch) -> dict[Objective, list[Call]]:
        """Returns the calls to add to each objective, and makes new ones."""
        calls = microbatch.calls
        optimizer = self._model.optimizer
        objectives.build_optimizers(calls, self._model.distribute_strategy)
        variables = self.make_accumulator().variables
        own = (id(optimizer), frozenset(map(id, variables)), 0)
        found = {}
        for key, group in objectives.by_loss(calls).items():
            objective = self._first if key == own else self._other(key, group)
            objective.is_called = True
            found[objective] = group
        return found

    def _other(self, key, calls) -> Objective:
        """Returns the objective of some calls, and makes it if it is new."""
        if key not in self._others:
            made = Objective(self._accumulator_of(calls[0].variables))
            self._others[key] = made, calls[0].optimizer
            state = self._restored.pop(len(self._others), None)
            if state is not None:
                replicas.outside_of_tracing(
                    lambda: made.accumulator.restore(state, self._num_replicas)
                )
        return self._others[key][0]

    def sums(self) -> list[tf.Tensor | tf.Variable]:
        """Returns the weights and the buffers."""
        self.make_accumulator()
        return [v for each in self._objectives for v in each.accumulator.sums()]

    def updates(self, totals: Sequence[tf.Tensor]) -> list[Update]:
        """Returns the updates that the window makes, one for each optimizer.

        Args:
            totals: What the replicas' `sums` add up to.
        """
        self.make_accumulator()
        if self._restored:
            raise ValueError(
                "The window comes from a checkpoint, with gradients for "
                f"{len(self._restored)} more losses than any step of this "
                "model has accumulated. Train on a batch before the window "
                "ends, with the `train_step` that it was begun with."
            )
        totals, updates = iter(totals), []
        for objective, optimizer in self.objectives:
            sums = [next(totals) for _ in objective.accumulator.sums()]
            if objective.is_called or objective is not self._first:
                arguments = objective, optimizer, sums, self._num_replicas
                updates.append(objectives.update_of(*arguments))
        return objectives.joined(updates)

    def close(self, totals, applies) -> None:
        """Leaves the buffers to the next micro-batch, which starts them."""
        self.make_accumulator()
        for objective in self._objectives:
            objective.accumulator.forget()

    def reset(self) -> None:
        """Forgets what was gathered."""
        self._restored.clear()
        for objective in self._objectives:
            objective.accumulator.forget()

    def state(self) -> dict[str, np.ndarray]:
        """Returns the weights, the counts and the buffers."""
        # As it stands: a layer may be frozen while it is saved.
        state = self.accumulator.state(self._num_replicas)
        others = dict(self._restored)
        for number, (objective, _) in enumerate(self._others.values(), 1):
            others[number] = objective.accumulator.state(self._num_replicas)
        return state | objectives.named_states(others)

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless the variables are the same."""
        self.make_accumulator().check_state(state)
        others = objectives.states_of_others(state)
        for number, (objective, _) in enumerate(self._others.values(), 1):
            if number in others:
                objective.accumulator.check_state(others[number])

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the buffers that `state` returned."""
        self.make_accumulator().restore(state, self._num_replicas)
        # If there are gradients, somebody has accumulated them.
        self._first.is_called |= bool(self._first.variables)
        self._restored = objectives.states_of_others(state)
        for number, (objective, _) in enumerate(self._others.values(), 1):
            if number in self._restored:
                objective.accumulator.restore(
                    self._restored.pop(number), self._num_replicas
                )
            else:
                objective.accumulator.reset()

    @property
    def _num_replicas(self):
        return self._model.distribute_strategy.num_replicas_in_sync
