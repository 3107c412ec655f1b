"""What becomes of gradients that hold a NaN or an infinity.

As ordinary code, for `nonfinite="skip_microbatch"`:

```python
for x, y in window:
    gradient = gradient_of(x, y)
    if all_finite(gradient):
        total, weight = total + len(x) * gradient, weight + len(x)
if weight:
    optimizer.apply(total / weight)
```

The real thing decides on the device, where an `if` would carry all variables
through it: it computes what it would without the policy, and selects. It never
multiplies by zero, which leaves a NaN what it is.

`"skip_window"` looks once a window, at the sum: what was added to a NaN or an
infinity is not finite either.

`python -m benchmarks.window_time` measures what that takes, on a model whose
time goes into reading and writing weights: 1.00 of the time without for
`"skip_microbatch"`, 1.03 for `"skip_window"`, which reads the sums once more.
"""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import finite
from keras_accum import replicas
from keras_accum import selection
from keras_accum.window import check_policy

POLICIES = ("propagate", "skip_microbatch", "skip_window")


class NonfiniteMixin:
    """The policy, and how often it had to act."""

    _nonfinite = "propagate"
    _accum_nonfinite = None

    @property
    def nonfinite(self) -> str:
        """What becomes of gradients with a NaN or an infinity.

        May be set at any time. A change forgets the micro-batches that the
        window has so far, and traces the steps again.
        """
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        if check_nonfinite(value) == self._nonfinite:
            return
        self._nonfinite = value
        # What the window has was counted by the other policy.
        self.reset_window()
        self._start_accumulating(changed=True)

    @property
    def nonfinite_microbatches(self) -> int:
        """Micro-batches that `"skip_microbatch"` left out, in this epoch.

        Of all replicas together. Without `fit`, since the last one began.
        """
        return self._number_skipped("skip_microbatch")

    @property
    def nonfinite_windows(self) -> int:
        """Windows that `"skip_window"` left without an update, likewise."""
        return self._number_skipped("skip_window")

    def _number_skipped(self, policy):
        counts = self._accum_nonfinite
        if counts is None or self.nonfinite != policy:
            return 0
        return round(float(tf.convert_to_tensor(counts.skipped)))

    def _nonfinite_logs(self):
        """What the epoch's logs say of it: nothing, unless there was any."""
        names = ("nonfinite_microbatches", "nonfinite_windows")
        numbers = {name: getattr(self, name) for name in names}
        return {name: number for name, number in numbers.items() if number}

    def _nonfinite_counts(self):
        if self._accum_nonfinite is None:
            self._accum_nonfinite = replicas.on_each(
                self.distribute_strategy, Counts
            )
        return self._accum_nonfinite

    def _check_microbatch(self, now, gradients):
        """Finds out whether a micro-batch counts, if that is the policy.

        Args:
            now: The `Microbatch`.
            gradients: Its gradients, of any kind.
        """
        if self.nonfinite != "skip_microbatch" or now.is_finite is not None:
            return
        counts = self._nonfinite_counts()
        now.note_finite(
            finite.all_finite(gradients, replicas.on_cpu(counts.skipped))
        )
        counts.add(now.is_finite, now.counts, now.first)

    def _nonfinite_sums(self):
        """What is summed over the replicas at a boundary."""
        if self.nonfinite != "skip_microbatch":
            return []
        return [self._nonfinite_counts().window]

    def _close_nonfinite(self, sums, gathered):
        """Whether the window makes an update; None if it does for certain.

        Args:
            sums: What the replicas' `_nonfinite_sums` add up to.
            gathered: The window's weight and the sums of its gradients.
        """
        if self.nonfinite == "propagate":
            return None
        counts = self._nonfinite_counts()
        if self.nonfinite == "skip_window":
            # Not the means, which would have to be written out for it.
            is_good = finite.all_finite(gathered)
            number = self.distribute_strategy.num_replicas_in_sync
            bad = 1 - tf.cast(is_good, tf.float32)
            # All replicas found the same, and their counts are summed.
            counts.skipped.assign_add(bad / number)
            return is_good
        (window,) = sums
        counts.window.assign(tf.zeros_like(counts.window))
        return window[1] > 0

    @contextlib.contextmanager
    def _updating_if(self, is_good, sums) -> Iterator[None]:
        """Leaves weights and the optimizer's state as they are, unless good.

        Args:
            is_good: What `_close_nonfinite` returned.
            sums: As for `_close_nonfinite`.
        """
        optimizer = self.optimizer
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        # That one makes no update of what is not finite, by itself, and lowers
        # its scale.
        if is_good is None or (self.nonfinite == "skip_window" and scales):
            yield
            return
        if not optimizer.built:
            self._build_optimizer_now()
        variables = self.trainable_weights + optimizer.variables
        own = [compat.own_copy(variable.value) for variable in variables]
        if scales:
            scale = compat.own_copy(optimizer.dynamic_scale.value)
            before = tf.identity(scale)
        with selection.assigning_if(is_good, own):
            yield
        if scales:
            # It does not see the micro-batches that were left out. With the
            # same scale the next ones would be, too, and so for ever.
            lower_scale(optimizer, sums[0][0] > 0, before)


class Counts:
    """How many micro-batches were found not to be finite.

    Each replica has its own.

    Attributes:
        window: Micro-batches of this window that were left out, and those that
            count; a float vector.
        skipped: What was left out in this epoch; a float scalar.
    """

    def __init__(self) -> None:
        self.window = replicas.sum_variable(tf.zeros((2,)), "nonfinite_window")
        self.skipped = replicas.sum_variable(tf.zeros(()), "nonfinite")

    @property
    def variables(self) -> list[tf.Variable]:
        """All that steps assign."""
        return [self.window, self.skipped]

    def add(
        self,
        is_finite: tf.Tensor,
        counts: tf.Tensor,
        first: bool | None,
    ) -> None:
        """Counts one micro-batch.

        Args:
            is_finite: Whether its gradients are finite; a bool tensor.
            counts: Whether it counts: it is finite, and has rows; likewise.
            first: Whether it is known to be its window's first.
        """
        bad = tf.cast(tf.logical_not(is_finite), tf.float32)
        numbers = tf.stack([bad, tf.cast(counts, tf.float32)])
        if first:
            self.window.assign(numbers)
        else:
            self.window.assign_add(numbers)
        self.skipped.assign_add(bad)

    def forget_window(self) -> None:
        """Forgets what the window has so far."""
        self.window.assign(tf.zeros((2,)))

    def forget(self) -> None:
        """Starts an epoch."""
        self.skipped.assign(tf.zeros(()))


def lower_scale(optimizer, is_bad, before):
    """Halves a `LossScaleOptimizer`'s scale if `is_bad`.

    Args:
        optimizer: The optimizer.
        is_bad: A bool tensor.
        before: The scale before the update.
    """
    scale = compat.own_copy(optimizer.dynamic_scale.value)
    steps = compat.own_copy(optimizer.step_counter.value)
    scale.assign(tf.where(is_bad, 0.5 * before, scale))
    steps.assign(tf.where(is_bad, tf.zeros_like(steps), steps))


def check_nonfinite(value):
    """Returns `value`, or raises unless it names a policy."""
    return check_policy("nonfinite", value, POLICIES)
