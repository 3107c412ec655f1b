"""What all windows so far tell of the gradients' noise."""

import math
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from keras_accum import noise_scale
from keras_accum import replicas

# A schedule waits for so many windows.
LEAST_WINDOWS = 8


class KnownNoise:
    """The gradient noise scale, as the windows so far tell.

    Replicas find the same, but for rounding: another machine may round in
    another way. What a schedule takes is the mean over all of what they found.
    They send it with the next window, so that it comes one window later.

    Args:
        model: The model.

    Attributes:
        share: The ends of the interval that the noise scale is in, in steps,
            divided by the number of replicas; each has its own. None before it
            is needed.
        steps: The sum of these, a float32 vector; the same on all.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._moments: tf.Variable | None = None
        self.share: tf.Variable | None = None
        self.steps: tf.Variable | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables so far."""
        if self._moments is None:
            return []
        return [self._moments, self.share, self.steps]

    def make_variables(self) -> None:
        """Makes the variables, unless they exist."""
        if self._moments is not None:
            return
        nothing = tf.constant(noise_scale.no_windows())
        self._moments, self.share, self.steps = replicas.on_each(
            self._model.distribute_strategy,
            lambda: (
                replicas.same_variable(nothing, "noise_moments"),
                replicas.sum_variable(tf.fill((2,), np.nan), "noise_share"),
                replicas.same_variable(tf.fill((2,), np.nan), "noise_scale"),
            ),
        )

    def add(self, trace, norm, weight, step, is_known, sent) -> None:
        """Adds a window, within each replica.

        Args:
            trace: As for `noise_scale.advanced`.
            norm: As for `noise_scale.advanced`.
            weight: As for `noise_scale.advanced`.
            step: As for `noise_scale.advanced`.
            is_known: Whether the window tells anything; a bool scalar.
            sent: The sum of the shares of all replicas.
        """
        num_replicas = self._model.distribute_strategy.num_replicas_in_sync
        before = tf.identity(self._moments)
        after = noise_scale.advanced(before, trace, norm, weight, step)
        after = tf.where(is_known, after, before)
        self._moments.assign(after)
        own = noise_scale.in_steps(after, LEAST_WINDOWS)
        own = tf.cast(own, tf.float32)
        self.share.assign(own / num_replicas)
        self.steps.assign(own if num_replicas == 1 else sent)

    def moments(self) -> noise_scale.Moments:
        """Returns the moving sums over the windows; floats."""
        return noise_scale.Moments(*map(float, self._vector()))

    def value(self) -> float:
        """Returns the noise scale alone, without any work for the device."""
        moments = self.moments()
        if not moments.windows:
            return math.nan
        if moments.norms <= 0.0:
            return math.inf
        return max(moments.traces, 0.0) / moments.norms

    def estimate(self) -> noise_scale.Estimate:
        """Returns the noise scale in the unit of the weights; floats."""
        found = noise_scale.estimate(tf.constant(self._vector()))
        return noise_scale.Estimate(*map(float, found))

    def _vector(self):
        if self._moments is None:
            return noise_scale.no_windows()
        return self._copies(self._moments)[0].numpy()

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint needs at any time, by name."""
        if not self.moments().windows:
            return {}
        return {
            "noise_moments": self._vector(),
            "noise_share": replicas.total(self.share),
            "noise_steps": self._copies(self.steps)[0].numpy(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned, if it is there."""
        if "noise_moments" not in state:
            return
        self.make_variables()
        for name, variable in (
            ("noise_moments", self._moments),
            ("noise_steps", self.steps),
        ):
            for copy in self._copies(variable):
                copy.assign(state[name])
        replicas.assign_total(
            self._model.distribute_strategy, self.share, state["noise_share"]
        )

    def _copies(self, variable):
        return replicas.copies(self._model.distribute_strategy, variable)
