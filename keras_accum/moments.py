"""BatchNormalization's moving statistics: one update a window, of its moments.

As ordinary code, for the values `x` of one channel in all of a window:

```python
moving_mean += (1 - momentum) * (mean(x) - moving_mean)
moving_variance += (1 - momentum) * (variance(x) - moving_variance)
```

Layers that see micro-batches would do so k times, and the variance between
micro-batches would be in none of theirs. The real thing merges the moments of
micro-batches as Chan, Golub and LeVeque do, and has the layers update once, at
the boundary. What the layers normalise with stays the micro-batch's.

References: T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979.
"""

import collections
import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas
from keras_accum.accumulator import keep_unless
from keras_accum.microbatch import Microbatch
from keras_accum.microbatch import Moments


@dataclasses.dataclass(frozen=True)
class Sum:
    """The moments of what a layer has seen in this window, in one of its calls.

    Attributes:
        layer: The layer.
        state: The number of values of a channel, their means, and the sums of
            the squared distances from these: a float vector. Each replica has
            its own.
    """

    layer: keras.layers.BatchNormalization
    state: tf.Variable

    def parts(self, vector=None):
        """Number, means and squared distances, of `state` or another vector."""
        vector = tf.convert_to_tensor(self.state if vector is None else vector)
        channels = (vector.shape[0] - 1) // 2
        number, *others = tf.split(vector, [1, channels, channels])
        return number[0], *others

    def assign(self, number, means, distances) -> None:
        """Assigns the `state`."""
        self.state.assign(tf.concat([number[None], means, distances], axis=0))


class WindowMoments:
    """The moments of a window, for each layer and each time that it is called.

    Args:
        strategy: Under which the layers were made.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self._sums: dict[tuple[int, int], Sum] = {}

    @property
    def states(self) -> list[tf.Variable]:
        """The variables that hold them."""
        return [each.state for each in self._sums.values()]

    def add(self, now: Microbatch, first: bool | tf.Tensor) -> None:
        """Adds those of one micro-batch.

        Args:
            now: The micro-batch, with its `moments`.
            first: Whether it is the window's first, as a bool or a tensor.
        """
        calls = collections.Counter()
        for moments in now.moments:
            key = id(moments.layer), calls[id(moments.layer)]
            calls[id(moments.layer)] += 1
            if key not in self._sums:
                self._sums[key] = self._make_sum(
                    moments.layer,
                    [1 + 2 * moments.means.shape[0]],
                    moments.means.dtype,
                )
            # Those of no rows are no numbers.
            number, means, variances = map(
                now.or_nothing,
                (moments.number, moments.means, moments.variances),
            )
            known = self._sums[key]
            number_before, means_before, distances = (
                keep_unless(first, part) for part in known.parts()
            )
            total = number_before + number
            share = tf.math.divide_no_nan(number, total)
            steps = means - means_before
            known.assign(
                total,
                means_before + share * steps,
                distances
                + number * variances
                + number_before * share * tf.square(steps),
            )

    def state(self, places: dict[int, int]) -> dict[str, np.ndarray]:
        """What was gathered, over all replicas, by name; for `restore`.

        Args:
            places: A number for each layer, by its `id`.
        """
        names = [
            f"moments_{places[layer]}_{call}" for layer, call in self._sums
        ]
        if not replicas.has_several(self._strategy):
            totals = self.states
        else:
            totals = [
                self._merged(each, self._strategy.reduce("SUM", vector, None))
                for each, vector in zip(
                    self._sums.values(),
                    self._strategy.run(tf.function(self.sums, autograph=False)),
                    strict=True,
                )
            ]
        return {
            name: np.asarray(total)
            for name, total in zip(names, totals, strict=True)
        }

    def restore(
        self,
        state: Mapping[str, np.ndarray],
        layers: Sequence[keras.layers.BatchNormalization],
    ) -> None:
        """Goes on from what was gathered before, by any number of replicas.

        Args:
            state: What `state` returned, and maybe more.
            layers: The layers, in the order of their places.
        """
        self.forget()
        for name, value in state.items():
            if not name.startswith("moments_"):
                continue
            place, call = map(int, name.split("_")[1:])
            layer = layers[place]
            key = id(layer), call
            if key not in self._sums:
                self._sums[key] = self._make_sum(
                    layer, value.shape, value.dtype
                )
            replicas.assign_total(self._strategy, self._sums[key].state, value)

    def _merged(self, each, total):
        """A `Sum.state`, of what the `sums` of all replicas add up to."""
        number, steps, squares = each.parts(total)
        steps = tf.math.divide_no_nan(steps, number)
        squares -= number * tf.square(steps)
        return tf.concat(
            [number[None], self._centers(each) + steps, squares], axis=0
        )

    def sums(self) -> list[tf.Tensor]:
        """What can be added up over the replicas: a vector for each layer.

        The number, and the sums of the distances and of the squared distances
        from `_centers`.
        """
        vectors = []
        for each in self._sums.values():
            number, means, distances = each.parts()
            steps = means - self._centers(each)
            vectors.append(
                tf.concat(
                    [
                        number[None],
                        number * steps,
                        distances + number * tf.square(steps),
                    ],
                    axis=0,
                )
            )
        return vectors

    def update_layers(self, totals: Sequence[tf.Tensor]) -> None:
        """Has the layers update their moving statistics, and starts anew.

        Args:
            totals: What the `sums` of all replicas add up to.
        """
        for each, total in zip(self._sums.values(), totals, strict=True):
            number, steps, squares = each.parts(total)
            steps = tf.math.divide_no_nan(steps, number)
            squares = tf.math.divide_no_nan(squares, number)
            means = self._centers(each) + steps
            variances = tf.nn.relu(squares - tf.square(steps))
            with compat.assigning_through(selecting(number > 0)):
                update_statistics(each.layer, means, variances)
        self.forget()

    def forget(self) -> None:
        """Starts anew."""
        for state in self.states:
            state.assign(tf.zeros(state.shape, state.dtype))

    def _centers(self, each):
        """Values near the means, which all replicas know."""
        if not replicas.has_several(self._strategy):
            _, means, _ = each.parts()
            return means
        # Replicas have these in common, and after a while they are near.
        return tf.cast(each.layer.moving_mean, each.state.dtype)

    def _make_sum(self, layer, shape, dtype):
        state = replicas.on_each(
            self._strategy,
            lambda: replicas.sum_variable(tf.zeros(shape, dtype), "moments"),
        )
        return Sum(layer, state)


def update_statistics(layer, means, variances) -> None:
    """Does what a BatchNormalization does with the moments of a batch."""
    if layer.renorm:
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
    """For `compat.assigning_through`: nothing changes unless `condition`."""
    return lambda variable, value: tf.where(
        condition, tf.cast(value, variable.dtype), variable
    )


def moments_of(layer, inputs, mask, means, variances) -> Moments:
    """The `Moments` that a layer computed of its inputs.

    Args:
        layer: A `keras.layers.BatchNormalization`.
        inputs: What it normalises, with its channels along `layer.axis`.
        mask: Which entries count, of the shape of `inputs` without the last
            axis; None for all.
        means: Of the channels.
        variances: Of the channels.
    """
    channels = layer.moving_mean.shape[0]
    # Of one channel, Keras leaves out the axis if there is a mask.
    means, variances = (
        tf.reshape(values, [channels]) for values in (means, variances)
    )
    if mask is None:
        number = tf.size(inputs) // channels
    else:
        number = tf.math.count_nonzero(mask)
    return Moments(layer, tf.cast(number, means.dtype), means, variances)
