"""BatchNormalization's moving statistics: one update a window, of its moments.

As ordinary code, for the values `x` of one channel in all of a window:

```python
moving_mean += (1 - momentum) * (mean(x) - moving_mean)
moving_variance += (1 - momentum) * (variance(x) - moving_variance)
```

Layers that see micro-batches would do so k times, and the variance between
micro-batches would be in none of theirs. The real thing merges the moments of
micro-batches as Chan, Golub and LeVeque do, and updates the layers once, at the
boundary. What the layers normalize with stays the micro-batch's.

References: T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979.
"""

import collections
import dataclasses
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import programs
from keras_accum import replicas
from keras_accum.control_flow import after_all_ops
from keras_accum.gradients import keep_unless
from keras_accum.microbatch import Microbatch
from keras_accum.window import Part
from keras_accum.window import if_applied


@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """The moments of what a layer has seen in this window, in one of its calls.

    Attributes:
        layer: The layer.
        state: The number of values of a channel, their means, and the sums of
            the squared distances from these: a float vector. Each replica has
            its own.
    """

    layer: keras.layers.BatchNormalization
    state: tf.Variable

    def split(self, vector=None):
        """Returns the count, means and squared distances in a vector."""
        vector = tf.convert_to_tensor(self.state if vector is None else vector)
        channels = (vector.shape[0] - 1) // 2
        count, *others = tf.split(vector, [1, channels, channels])
        return count[0], *others

    def assign(self, count, means, distances) -> None:
        """Assigns the `state`."""
        self.state.assign(tf.concat([count[None], means, distances], axis=0))


class WindowMoments(Part):
    """The moments of a window, for each layer and each time that it is called.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._calls: dict[tuple[int, int], LayerMoments] = {}

    @property
    def _strategy(self):
        return self._model.distribute_strategy

    @property
    def variables(self) -> list[tf.Variable]:
        """The states of all calls."""
        return [each.state for each in self._calls.values()]

    def add(self, microbatch: Microbatch) -> None:
        """Adds the moments that a micro-batch recorded."""
        if not microbatch.moments:
            return
        is_first = microbatch.is_first
        # Last, so that a step that fails leaves the window as it was.
        with tf.control_dependencies(after_all_ops()):
            num_calls = collections.Counter()
            for moments in microbatch.moments:
                key = id(moments.layer), num_calls[id(moments.layer)]
                num_calls[id(moments.layer)] += 1
                # The moments of no rows are no numbers.
                self._merge(
                    self._call(
                        key,
                        moments.layer,
                        [1 + 2 * moments.means.shape[0]],
                        moments.means.dtype,
                    ),
                    *map(
                        microbatch.or_nothing,
                        (moments.count, moments.means, moments.variances),
                    ),
                    is_first,
                )

    def _merge(self, call, count, means, variances, is_first):
        count_before, means_before, distances = (
            keep_unless(is_first, each) for each in call.split()
        )
        total = count_before + count
        share = tf.math.divide_no_nan(count, total)
        steps = means - means_before
        call.assign(
            total,
            means_before + share * steps,
            distances
            + count * variances
            + count_before * share * tf.square(steps),
        )

    def sums(self) -> list[tf.Tensor]:
        """Returns what can be added up over the replicas: a vector for a call.

        The count, and the sums of the distances and of the squared distances
        from `_centers`.
        """
        vectors = []
        for call in self._calls.values():
            count, means, distances = call.split()
            steps = means - self._centers(call)
            vectors.append(
                tf.concat(
                    [
                        count[None],
                        count * steps,
                        distances + count * tf.square(steps),
                    ],
                    axis=0,
                )
            )
        return vectors

    def close(self, totals, applies) -> None:
        """Updates the layers' moving statistics, and starts a new window."""
        totals = if_applied(totals, applies)
        for call, total in zip(self._calls.values(), totals, strict=True):
            count, steps, squares = call.split(total)
            steps = tf.math.divide_no_nan(steps, count)
            squares = tf.math.divide_no_nan(squares, count)
            means = self._centers(call) + steps
            variances = tf.nn.relu(squares - tf.square(steps))
            with compat.assigning_through(selecting(count > 0)):
                update_statistics(call.layer, means, variances)
        self.reset()

    def reset(self) -> None:
        """Forgets the moments so far."""
        for state in self.variables:
            state.assign(tf.zeros(state.shape, state.dtype))

    def state(self) -> dict[str, np.ndarray]:
        """Returns the merged moments of all replicas, by layer and call."""
        layers = compat.normalizations(self._model)
        places = {id(layer): place for place, layer in enumerate(layers)}
        names = [
            f"moments_{places[layer]}_{call}" for layer, call in self._calls
        ]
        if not replicas.has_several(self._strategy):
            totals = self.variables
        else:
            totals = [
                self._merged(call, self._strategy.reduce("SUM", vector, None))
                for call, vector in zip(
                    self._calls.values(),
                    self._strategy.run(programs.in_graph(self.sums)),
                    strict=True,
                )
            ]
        return {
            name: np.asarray(total)
            for name, total in zip(names, totals, strict=True)
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the moments that `state` returned."""
        self.reset()
        layers = compat.normalizations(self._model)
        for name, value in state.items():
            if not name.startswith("moments_"):
                continue
            place, index = map(int, name.split("_")[1:])
            layer = layers[place]
            key = id(layer), index
            call = self._call(key, layer, value.shape, value.dtype)
            replicas.assign_total(self._strategy, call.state, value)

    def _merged(self, call, total):
        """Returns a `state`, of what the `sums` of all replicas add up to."""
        count, steps, squares = call.split(total)
        steps = tf.math.divide_no_nan(steps, count)
        squares -= count * tf.square(steps)
        return tf.concat(
            [count[None], self._centers(call) + steps, squares], axis=0
        )

    def _centers(self, call):
        """Returns values near the means, which all replicas have."""
        if not replicas.has_several(self._strategy):
            _, means, _ = call.split()
            return means
        # Replicas have these in common, and after a while they are near.
        return tf.cast(call.layer.moving_mean, call.state.dtype)

    def _call(self, key, layer, shape, dtype):
        """Returns the `LayerMoments` of a call, which may be its first."""
        if key not in self._calls:
            state = replicas.on_each(
                self._strategy,
                lambda: replicas.sum_variable(
                    tf.zeros(shape, dtype), "moments"
                ),
            )
            self._calls[key] = LayerMoments(layer, state)
        return self._calls[key]


def update_statistics(layer, means, variances) -> None:
    """Updates a BatchNormalization by moments, as it does after a batch."""
    if compat.renormalizes(layer):
        compat.update_renorm_statistics(layer, means, variances)
        return
    for variable, value in (
        (layer.moving_mean, means),
        (layer.moving_variance, variances),
    ):
        moving = tf.cast(variable, value.dtype)
        variable.assign(
            moving * layer.momentum + value * (1.0 - layer.momentum)
        )


def selecting(condition):
    """Returns what selects by `condition`, for `compat.assigning_through`."""
    return lambda variable, value: tf.where(
        condition, tf.cast(value, variable.dtype), variable
    )
