"""A window: what is gathered between two updates, kind by kind.

`window_kinds.py` is the only place that lists the kinds. A new kind is a class
with the methods of `Part` and a line there; that it is summed over replicas,
saved, restored and forgotten follows.

As ordinary code, for one replica:

```python
for microbatch in window:
    for part in parts:
        part.add(microbatch)
totals = {name: sum_over_replicas(part.sums()) for name, part in parts}
for name, part in parts:
    part.close(totals[name], applies)
```
"""

from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from keras_accum import replicas
from keras_accum.gradients import keep_unless
from keras_accum.microbatch import Microbatch


class Part:
    """One kind of thing that a window gathers. Each replica has its own."""

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that hold what was gathered so far."""
        return []

    def make_variables(self) -> None:
        """Makes those that are there always, before an update is traced."""

    def signature(self) -> int:
        """Returns what programs were traced for; it is asked for every step."""
        return len(self.variables)

    def add(self, microbatch: Microbatch) -> None:
        """Adds what a step recorded in its micro-batch."""
        # AutoGraph makes no function of a docstring alone, and warns of it.
        del microbatch

    def sums(self) -> list[tf.Tensor | tf.Variable]:
        """Returns what can be added up over the replicas."""
        return self.variables

    def close(self, totals: list[tf.Tensor], applies: tf.Tensor | None) -> None:
        """Ends the window, within each replica.

        Args:
            totals: What the `sums` of all replicas add up to.
            applies: Whether the window's update is made; a bool scalar, or None
                if it is for certain.
        """
        del totals, applies

    def reset(self) -> None:
        """Forgets what was gathered, on the host; other workers do not."""

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint needs, over all replicas, by name."""
        return {}

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless `restore` accepts `state`."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned, on any number of replicas.

        Args:
            state: Of all parts, of a window that had begun.
        """


class Window:
    """What a model gathers for an update.

    Args:
        parts: By name. The order is that in which replicas send them.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of all parts."""
        return [v for part in self._parts.values() for v in part.variables]

    def signature(self) -> tuple[int, ...]:
        """Returns how many variables each part has.

        If that changes, such as by a variable's first gradient, programs that
        were traced before do not fit.
        """
        return tuple(part.signature() for part in self._parts.values())

    def make_variables(self) -> None:
        """Makes the variables that are there always, unless they exist."""
        for part in self._parts.values():
            part.make_variables()

    def add(self, microbatch: Microbatch) -> None:
        """Adds what a step recorded in its micro-batch."""
        for part in self._parts.values():
            part.add(microbatch)

    def sums(self) -> dict[str, list[tf.Tensor]]:
        """Returns what can be added up over the replicas."""
        return {name: part.sums() for name, part in self._parts.items()}

    def close(self, totals: Mapping[str, list], applies) -> None:
        """Ends the window; see `Part.close`."""
        for name, part in self._parts.items():
            part.close(totals[name], applies)

    def reset(self) -> None:
        """Forgets what was gathered."""
        for part in self._parts.values():
            part.reset()

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint needs."""
        return {
            name: value
            for part in self._parts.values()
            for name, value in part.state().items()
        }

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless `restore` accepts `state`."""
        for part in self._parts.values():
            part.check_state(state)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        for part in self._parts.values():
            part.restore(state)


class LayerState(Part):
    """Other variables that steps assign, such as moving means.

    Each replica assigns its own copy. At a boundary the mean is taken.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._assigned: dict[int, keras.Variable] = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """The model's variables that steps assign, in the model's order."""
        if not self._assigned or not is_replicated(self._model):
            return []
        return [
            variable.value
            for variable in self._model.non_trainable_variables
            if id(variable) in self._assigned
        ]

    def signature(self) -> int:
        """Returns how many variables were seen, without a walk over layers."""
        return len(self._assigned)

    def add(self, microbatch: Microbatch) -> None:
        """Records which variables steps assign; these hold their own values."""
        if is_replicated(self._model):
            self._assigned |= microbatch.assigned

    def close(self, totals, applies) -> None:
        """Assigns the replicas' mean."""
        num_replicas = self._model.distribute_strategy.num_replicas_in_sync
        for variable, total in zip(self.variables, totals, strict=True):
            variable.assign(total / num_replicas)


class MetricSums(Part):
    """Variables of metrics that are sums over the replicas.

    They are an epoch's, and no window's: they are sent for the logs.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    @property
    def keras_variables(self) -> list[keras.Variable]:
        """The metrics' variables."""
        if not is_replicated(self._model):
            return []
        return [
            variable
            for variable in self._model.metrics_variables
            if variable.aggregation == "sum"
            and tf.as_dtype(variable.dtype).is_floating
        ]

    def signature(self) -> int:
        """Returns 0: metrics are made before the first update is traced."""
        return 0

    @property
    def variables(self) -> list[tf.Variable]:
        """The `tf.Variable`s that hold the values of `keras_variables`."""
        return [variable.value for variable in self.keras_variables]


def is_replicated(model: keras.Model) -> bool:
    """Returns whether there are several replicas."""
    return replicas.has_several(model.distribute_strategy)


def if_applied(totals: list[tf.Tensor], applies) -> list[tf.Tensor]:
    """Returns `totals`, or zeros if the window makes no update."""
    if applies is None:
        return totals
    skips = tf.logical_not(applies)
    return [keep_unless(skips, each) for each in totals]
