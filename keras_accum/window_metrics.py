"""What `fit` reports of windows: `window_metrics`."""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import loss_sums
from keras_accum import replicas
from keras_accum.checks import NOISE_SCALE
from keras_accum.checks import NORM
from keras_accum.checks import name_of
from keras_accum.loss_sums import LossSum
from keras_accum.objectives import Update
from keras_accum.options import Options
from keras_accum.window import Part
from keras_accum.window_gradients import Gradients
from keras_accum.window_noise import WindowNoise


class WindowMetrics(Part):
    """The metrics of windows: means over those of an epoch, and the noise.

    They are measured at the end of a window, from what is summed anyway.

    Args:
        model: The model.
        options: Its options.
        gradients: What its window has of gradients.
        noise: What it has of their noise.

    Attributes:
        options: As above.
        advised: The share of a window that was said to be enough.
    """

    def __init__(
        self,
        model: keras.Model,
        options: Options,
        gradients: Gradients,
        noise: WindowNoise,
    ) -> None:
        self._model, self.options = model, options
        self._gradients, self._noise = gradients, noise
        self.advised = 2.0
        # The number of windows in an epoch, and the sum over them, by name.
        self._sums: dict[str, tf.Variable] = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """The sums of the epoch so far."""
        return list(self._sums.values())

    def make_variables(self) -> None:
        """Makes the variables that are needed, unless they exist."""
        for name in map(name_of, self.options.window_metrics):
            if name != NOISE_SCALE and name not in self._sums:
                self._sums[name] = replicas.on_each(
                    self._model.distribute_strategy,
                    lambda name=name: replicas.same_variable(
                        tf.zeros((2,)), name
                    ),
                )

    def sums(self) -> list[tf.Variable]:
        """Returns nothing: all replicas measure the same."""
        return []

    def measure(
        self,
        totals: Mapping[str, list],
        updates: Sequence[Update],
        applies: tf.Tensor | None,
    ) -> None:
        """Measures a window, within each replica, before it moves weights.

        Args:
            totals: What the `sums` of all parts add up to, by name.
            updates: What the window makes.
            applies: As for `Part.close`.
        """
        if not (self.options.window_metrics or self._noise.is_measured):
            return
        self.make_variables()
        losses = self._loss_sums(totals["gradients"])
        counts = tf.constant(True) if applies is None else applies
        self._noise.measure(losses, totals["noise"], counts)
        metrics = {
            name_of(metric): metric
            for metric in self.options.window_metrics
            if metric != NOISE_SCALE
        }
        if not metrics:
            return
        scales = any(
            isinstance(each.optimizer, keras.optimizers.LossScaleOptimizer)
            for each in updates
        )
        norm = tf.zeros(())
        if NORM in metrics or scales:
            on_cpu = replicas.on_cpu(self._gradients.accumulator.weight)
            norm = tf.sqrt(loss_sums.squared_norm(losses, on_cpu))
        if scales:
            # An overflow lowers the scale, and has no norm.
            counts &= tf.math.is_finite(norm)
        for name, metric in metrics.items():
            value = norm
            if metric != NORM:
                value = metric(mean_gradients(self._model, updates))
            value = as_scalar(value, name)
            pair = tf.stack([tf.ones(()), value])
            pair = tf.where(counts, pair, tf.zeros_like(pair))
            self._sums[name].assign_add(pair)

    def _loss_sums(self, totals):
        """Returns what the window has of each loss."""
        totals, found = iter(totals), []
        num_replicas = self._model.distribute_strategy.num_replicas_in_sync
        for objective, optimizer in self._gradients.objectives:
            accumulator = objective.accumulator
            pairs = zip(accumulator.variables, accumulator.buffers, strict=True)
            weight = tf.cast(next(totals), tf.float32)
            if objective.is_called:
                weight *= loss_sums.scale_of(optimizer)
            sums = {
                id(variable): next(totals)
                for variable, buffer in pairs
                if buffer is not None
            }
            for variable in accumulator.variables:
                if compat.is_overwritten(variable):
                    sums.pop(id(variable), None)
            factor = tf.math.divide_no_nan(float(num_replicas), weight)
            found.append(LossSum(optimizer, factor, sums))
        return found

    def begin_epoch(self) -> None:
        """Begins the means over an epoch."""
        for variable in self._sums.values():
            for copy in self._copies(variable):
                copy.assign(tf.zeros((2,)))

    def _copies(self, variable):
        return replicas.copies(self._model.distribute_strategy, variable)

    def add_to(self, logs: dict) -> None:
        """Adds what the windows tell to the logs of a step, or raises."""
        found = self.logs()
        if taken := sorted(found.keys() & logs.keys()):
            raise ValueError(
                "`window_metrics` must have names that the logs of a step do "
                "not have already. Rename the function, or what the step logs. "
                f"Received: {taken}"
            )
        logs.update(found)

    def logs(self, with_interval: bool = False) -> dict[str, float]:
        """Returns what the windows of the epoch tell so far, by name.

        Args:
            with_interval: Whether to add the interval of the noise scale.
        """
        logs = {}
        for name in map(name_of, self.options.window_metrics):
            if name == NOISE_SCALE:
                logs[name] = self._noise.known.value()
                if with_interval:
                    found = self._noise.known.estimate()
                    logs[f"{name}_low"] = found.low
                    logs[f"{name}_high"] = found.high
                continue
            number, total = 0.0, float("nan")
            if name in self._sums:
                number, total = self._copies(self._sums[name])[0].numpy()
            logs[name] = float(total / number) if number else float("nan")
        return logs


def as_scalar(value, name: str) -> tf.Tensor:
    """Returns a float32 scalar, or raises if a metric returned another shape.

    Args:
        value: What the metric returned.
        name: Its name.
    """
    value = tf.cast(value, tf.float32)
    if value.shape.num_elements() not in (1, None):
        raise ValueError(
            f"`window_metrics`: `{name}` must return a scalar. Received a "
            f"tensor of shape {value.shape}"
        )
    return tf.reshape(value, ())


def mean_gradients(
    model: keras.Model, updates: Sequence[Update]
) -> list[tf.Tensor | None]:
    """Returns the window's mean gradients, one for each trainable weight.

    They are not scaled; where two optimizers have a weight, theirs add up.

    Args:
        model: The model.
        updates: What the window makes.
    """
    found: dict[int, tf.Tensor] = {}
    for update in updates:
        scale = loss_sums.scale_of(update.optimizer)
        for variable, gradient in zip(
            update.variables, update.gradients, strict=True
        ):
            if gradient is not None:
                gradient = gradient / tf.cast(scale, gradient.dtype)
                before = found.get(id(variable))
                found[id(variable)] = (
                    gradient if before is None else before + gradient
                )
    return [found.get(id(each)) for each in model.trainable_weights]
