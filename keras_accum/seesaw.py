"""Seesaw: the batch grows where the learning rate would fall."""

import math
from collections.abc import Callable
from typing import Any
from typing import Literal
from typing import Self

import keras
import numpy as np
import tensorflow as tf

from keras_accum.checks import check_policy
from keras_accum.halvings import find_cuts
from keras_accum.halvings import find_peak
from keras_accum.halvings import rates_of
from keras_accum.schedule_table import Schedule
from keras_accum.schedule_table import check_int
from keras_accum.schedule_table import shown
from keras_accum.schedule_table import starts_in_updates

# How many times smaller the rate gets where the batch is twice as large.
DIVISORS = {"adam": math.sqrt(2.0), "sgd": 1.0}


@keras.saving.register_keras_serializable("keras_accum")
class Seesaw(Schedule):
    """k doubles where the learning rate would fall by half.

    As ordinary code, for a `learning_rate` without a warm-up:

    ```python
    j = 0  # halvings
    while learning_rate(step) <= learning_rate(0) / 2 ** (j + 1):
        j += 1
    k = accum_steps * 2**j
    rate = learning_rate(0) / 2 ** (j / 2)  # "sgd": learning_rate(0)
    step += 2**j  # as many rows as before, in fewer updates
    ```

    The object itself is k, for `accum_steps`, and its attribute `learning_rate`
    is the rate, for the optimizer. Both depend on nothing but the updates so
    far: they cannot drift apart, and a restart changes neither.

    Until its peak, `learning_rate` is followed as it is, with the first k. From
    the peak on the rate is constant while k is. A k above `maximum` is not
    taken: from the cut to the largest k on, the rest of the decay is in the
    rate, and the schedule is followed as it is, from the rate there. So with a
    `maximum` of `accum_steps` nothing changes. After `duration`, k stays.

    Updates are counted as those of full windows, as for samples in
    `PiecewiseConstant`. A window that passes a cut ends first.

    Args:
        learning_rate: What one would give the optimizer for a training with
            `accum_steps` throughout: a schedule that rises once, or not at all,
            and then falls. Or a function of the step, an int64 scalar tensor,
            in operations of Keras or TensorFlow.
        duration: Updates that such a training would have; a positive int. `fit`
            needs as many micro-batches as that, `duration * accum_steps`.
        accum_steps: Micro-batches per window at the start, a positive int.
        maximum: The largest k that may be taken; a positive int.
        rule: `"adam"`: the rate is divided by the square root of 2 where k
            doubles. `"sgd"`: it stays.

    Attributes:
        learning_rate: The schedule for the optimizer; a
            `keras.optimizers.schedules.LearningRateSchedule`.

    Raises:
        TypeError: If a number is no integer, or `learning_rate` can't be
            called.
        ValueError: If a number is less than 1, `maximum` is less than
            `accum_steps`, `rule` is unknown, or `learning_rate` is not positive
            and finite, or rises again after it fell.

    References:
        - [Meterez et al., 2025](https://arxiv.org/abs/2510.14717): Seesaw.
        - [Smith et al., 2018](https://arxiv.org/abs/1711.00489): Don't Decay
            the Learning Rate, Increase the Batch Size.

    Example:

    ```python
    cosine = keras.optimizers.schedules.CosineDecay(1e-3, 10_000)
    seesaw = schedules.Seesaw(cosine, duration=10_000, maximum=16)
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, accum_steps=seesaw
    )
    model.compile(keras.optimizers.AdamW(seesaw.learning_rate), loss)
    ```
    """

    def __init__(
        self,
        learning_rate: (
            keras.optimizers.schedules.LearningRateSchedule
            | Callable[[tf.Tensor], tf.Tensor]
        ),
        duration: int,
        accum_steps: int = 1,
        maximum: int = 64,
        rule: Literal["adam", "sgd"] = "adam",
    ) -> None:
        if not callable(learning_rate):
            raise TypeError(
                "`learning_rate` must be a schedule, or a function of the "
                f"step. Received: learning_rate={learning_rate!r} (of type "
                f"{type(learning_rate).__name__})"
            )
        config = {
            "learning_rate": learning_rate,
            "duration": check_int("duration", duration),
            "accum_steps": check_int("accum_steps", accum_steps),
            "maximum": check_int("maximum", maximum),
            "rule": rule,
        }
        check_policy("rule", rule, tuple(DIVISORS))
        if maximum < accum_steps:
            raise ValueError(
                "`maximum` must be at least `accum_steps`, the k at the start. "
                f"Received: maximum={maximum}, accum_steps={accum_steps}"
            )
        rate_at = rates_of(learning_rate)
        self._peak = find_peak(rate_at, config["duration"])
        self._highest = rate_at(self._peak)
        # Which k is the largest, as a number of doublings.
        self._last = (maximum // accum_steps).bit_length() - 1
        cuts = find_cuts(rate_at, self._peak, config["duration"], self._last)
        # In windows of the first k, as the steps of `learning_rate` are.
        self._sizes = [2**j for j in range(len(cuts) + 1)]
        starts = starts_in_updates(cuts, self._sizes, microbatch=1)
        values = [config["accum_steps"] * size for size in self._sizes]
        super().__init__(config, starts, values)
        self.learning_rate: keras.optimizers.schedules.LearningRateSchedule = (
            SeesawRate(self)
        )

    def _rate_after(self, updates) -> tf.Tensor:
        """Returns what `learning_rate` does; see `SeesawRate`."""
        # Of each number of doublings: the update and the step that it begins
        # with, the rate there, and how it differs from `learning_rate`.
        sizes = np.array(self._sizes, "int64")
        begins = np.array([0, *self._starts], "int64")
        steps = np.cumsum([0, *(np.diff(begins) * sizes[:-1])])
        divisors = DIVISORS[self._config["rule"]] ** np.arange(len(sizes))
        updates = tf.cast(updates, tf.int64)
        j = tf.reduce_sum(tf.cast(updates >= begins, tf.int64)) - 1
        step = tf.gather(steps, j) + (updates - tf.gather(begins, j)) * (
            tf.gather(sizes, j)
        )
        dtype = keras.config.floatx()
        own = tf.cast(self._config["learning_rate"](step), dtype)
        follows = tf.logical_or(step < self._peak, j == self._last)
        return tf.where(
            follows,
            own * tf.cast(tf.gather(sizes / divisors, j), dtype),
            tf.cast(tf.gather(self._highest / divisors, j), dtype),
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        rate = keras.saving.serialize_keras_object(
            self._config["learning_rate"]
        )
        return self._config | {"learning_rate": rate}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes one from its configuration."""
        rate = keras.saving.deserialize_keras_object(config["learning_rate"])
        return cls(**config | {"learning_rate": rate})

    def __repr__(self) -> str:
        return shown(type(self).__name__, self._config, show_rate)


@keras.saving.register_keras_serializable("keras_accum")
class SeesawRate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of a `Seesaw`, after a number of updates.

    Args:
        seesaw: Whose it is.
    """

    def __init__(self, seesaw: Seesaw) -> None:
        self._seesaw = seesaw

    def __call__(self, step) -> tf.Tensor:
        """Returns the rate of the next update, a scalar of Keras's floatx.

        Args:
            step: Updates so far, an integer scalar.
        """
        return self._seesaw._rate_after(step)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"seesaw": keras.saving.serialize_keras_object(self._seesaw)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes one from its configuration."""
        return cls(keras.saving.deserialize_keras_object(config["seesaw"]))


def show_rate(value):
    """Returns the `repr` of an argument, of a rate as one would write it."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return shown(type(value).__name__, value.get_config())
    return getattr(value, "__name__", repr(value))
