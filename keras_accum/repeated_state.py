"""State that layers assign from weights alone: once a window.

As ordinary code, for a variable such as the vector of `SpectralNormalization`:

```python
before = variable.value
for microbatch in window:
    variable.assign(before)
    step(microbatch)
```

Each micro-batch then works with the same values, and leaves what the large
batch would leave.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas
from keras_accum.microbatch import Microbatch
from keras_accum.window import Part


class RepeatedState(Part):
    """The values with which a window began.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._keras_variables: list[keras.Variable] = []
        self._before: list[tf.Variable] = []
        # What a checkpoint had of a window, until the variables are known.
        self._restored: dict[str, np.ndarray] = {}

    def begin_with(self, variables: Sequence[keras.Variable]) -> None:
        """Decides which variables begin each micro-batch as the window did.

        Args:
            variables: Those that steps assign from weights alone.
        """
        self._keras_variables = list(variables)
        self._before = replicas.on_each(
            self._model.distribute_strategy,
            lambda: [
                tf.Variable(
                    # A window may have begun before it was known.
                    tf.convert_to_tensor(variable),
                    trainable=False,
                    name="window_start",
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
                for variable in self._keras_variables
            ],
        )
        self._assign_restored()

    def signature(self) -> int:
        """Returns how many variables there are."""
        return len(self._before)

    def start(self, microbatch: Microbatch) -> None:
        """Records the values with which a window begins, or restores them.

        Args:
            microbatch: The micro-batch that a step is to begin with.
        """
        if not self._before:
            return
        is_first = microbatch.is_first
        for variable, before in zip(
            self._keras_variables, self._before, strict=True
        ):
            local = compat.local_variable(variable.value)
            if is_first is True:
                before.assign(local)
                continue
            value = before.read_value()
            if is_first is not False:
                value = tf.where(is_first, local, value)
                before.assign(value)
            local.assign(value)

    def state(self) -> dict[str, np.ndarray]:
        """Returns the values, by name."""
        values = {
            f"repeated_{index}": replicas.total(before)
            for index, before in enumerate(self._before)
        }
        return values | self._restored

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues with the values that `state` returned."""
        self._restored = {
            name: value
            for name, value in state.items()
            if name.startswith("repeated_")
        }
        self._assign_restored()

    def reset(self) -> None:
        """Forgets what a checkpoint had; the next window records anew."""
        self._restored = {}

    def _assign_restored(self):
        for index, before in enumerate(self._before):
            value = self._restored.pop(f"repeated_{index}", None)
            if value is None:
                continue
            for copy in replicas.copies(
                self._model.distribute_strategy, before
            ):
                copy.assign(tf.cast(value, copy.dtype))
