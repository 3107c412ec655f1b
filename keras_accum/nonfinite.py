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
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import finite
from keras_accum import replicas
from keras_accum import selection
from keras_accum.annotations import Gradient
from keras_accum.microbatch import Microbatch
from keras_accum.objectives import Update
from keras_accum.window import Part

LOG_NAMES = {
    "skip_microbatch": "nonfinite_microbatches",
    "skip_window": "nonfinite_windows",
}


class SkipCounts(Part):
    """How many micro-batches were found not to be finite, and what follows.

    Args:
        model: The model.
        policy: One of `options.NONFINITE_POLICIES`.

    Attributes:
        policy: As above.
    """

    def __init__(self, model: keras.Model, policy: str) -> None:
        self.policy = policy
        self._model = model
        # How many micro-batches of this window were left out, and how many
        # count; how many this epoch left out. None before they are needed.
        self._window: tf.Variable | None = None
        self._skipped: tf.Variable | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """The counts, if they were made."""
        counts = (self._window, self._skipped)
        return [count for count in counts if count is not None]

    def make_variables(self) -> None:
        """Makes the counts, unless they exist or nothing is counted."""
        if self._window is None and self.policy != "propagate":
            self._window, self._skipped = replicas.on_each(
                self._model.distribute_strategy,
                lambda: (
                    replicas.sum_variable(tf.zeros((2,)), "nonfinite_window"),
                    replicas.sum_variable(tf.zeros(()), "nonfinite"),
                ),
            )

    @property
    def skipped(self) -> int:
        """Micro-batches or windows left out in this epoch, on all replicas."""
        if self._skipped is None or self.policy == "propagate":
            return 0
        return round(float(tf.convert_to_tensor(self._skipped)))

    def local_counts(self) -> tuple[tf.Tensor, ...]:
        """Returns the shares that this worker's replicas have in `skipped`."""
        if self._skipped is None or self.policy == "propagate":
            return ()
        copies = replicas.copies(self._model.distribute_strategy, self._skipped)
        return tuple(copy.read_value() for copy in copies)

    def logs(self) -> dict[str, int]:
        """Returns what to add to an epoch's logs, if anything was skipped."""
        count = self.skipped
        return {LOG_NAMES[self.policy]: count} if count else {}

    def begin_epoch(self) -> None:
        """Sets the count of the epoch to zero."""
        if self._skipped is not None:
            self._skipped.assign(0.0)

    def check(
        self, microbatch: Microbatch, gradients: Sequence[Gradient]
    ) -> None:
        """Decides whether a micro-batch counts, if that is the policy.

        It is asked as soon as there are gradients, and again if there are more.
        """
        if self.policy != "skip_microbatch":
            return
        self.make_variables()
        gradients = microbatch.not_looked_at(gradients)
        if gradients or microbatch.is_finite is None:
            on_cpu = replicas.on_cpu(self._skipped)
            microbatch.find_finite(finite.all_finite(gradients, on_cpu))

    def add(self, microbatch: Microbatch) -> None:
        """Counts a micro-batch."""
        if microbatch.is_finite is None:
            return
        is_finite = microbatch.is_finite
        bad = tf.cast(tf.logical_not(is_finite), tf.float32)
        counts = tf.stack([bad, tf.cast(microbatch.counts, tf.float32)])
        self._window.assign_add(counts)
        self._skipped.assign_add(bad)

    def applies(self, totals: list, gradient_sums: list) -> tf.Tensor | None:
        """Returns whether the window makes an update.

        Args:
            totals: What the replicas' `sums` add up to.
            gradient_sums: The window's weight and the sums of its gradients.

        Returns:
            A bool scalar; None if it does for certain.
        """
        if self.policy == "skip_window":
            # Not the means, which would have to be written out for it.
            return finite.all_finite(gradient_sums)
        if self.policy == "skip_microbatch":
            (window,) = totals
            return window[1] > 0
        return None

    def sums(self) -> list[tf.Variable]:
        """Returns the window's counts, where they decide on the update."""
        if self.policy != "skip_microbatch":
            return []
        self.make_variables()
        return [self._window]

    def close(self, totals, applies) -> None:
        """Ends the window, and counts it if it makes no update."""
        if self.policy == "skip_microbatch":
            self._window.assign(tf.zeros_like(self._window))
        elif applies is not None:
            self.make_variables()
            num_replicas = self._model.distribute_strategy.num_replicas_in_sync
            bad = 1 - tf.cast(applies, tf.float32)
            # All replicas found the same, and their counts are summed.
            self._skipped.assign_add(bad / num_replicas)

    def reset(self) -> None:
        """Forgets what the window has so far."""
        if self._window is not None:
            self._window.assign(tf.zeros((2,)))

    def state(self) -> dict[str, np.ndarray]:
        """Returns the window's counts."""
        if self.policy == "propagate":
            return {}
        self.make_variables()
        return {"nonfinite": replicas.total(self._window)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the counts that `state` returned."""
        if "nonfinite" in state and self.policy != "propagate":
            self.make_variables()
            replicas.assign_total(
                self._model.distribute_strategy,
                self._window,
                state["nonfinite"],
            )

    @contextlib.contextmanager
    def updating_if(
        self, applies, totals, update: Update, is_only: bool
    ) -> Iterator[None]:
        """Keeps an update from changing anything, unless it applies.

        Args:
            applies: What `applies` returned.
            totals: As for `applies`.
            update: The update.
            is_only: Whether the window makes no other.
        """
        optimizer = update.optimizer
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        lowers = scales and self.policy == "skip_microbatch"
        if scales and self.policy == "skip_window":
            # That one makes no update of what is not finite, by itself, and
            # lowers its scale. Others' gradients are not its scale's fault.
            applies = (
                None
                if is_only
                else applies | ~finite.all_finite(update.gradients)
            )
        if update.is_made is not None:
            applies = (
                update.is_made if applies is None else applies & update.is_made
            )
        if applies is None:
            yield
            return
        update.build_optimizer()
        variables = update.variables + optimizer.variables
        local = [
            compat.local_variable(variable.value) for variable in variables
        ]
        if lowers:
            scale = compat.local_variable(optimizer.dynamic_scale.value)
            before = tf.identity(scale)
        with selection.assigning_if(applies, local):
            yield
        if lowers:
            # It does not see the micro-batches that were left out. With the
            # same scale the next ones would be, too, and so for ever.
            lower_scale(optimizer, totals[0][0] > 0, before)


def lower_scale(optimizer, is_bad: tf.Tensor, before: tf.Tensor) -> None:
    """Halves a `LossScaleOptimizer`'s scale if `is_bad`.

    Args:
        optimizer: The optimizer.
        is_bad: A bool tensor.
        before: The scale before the update.
    """
    scale = compat.local_variable(optimizer.dynamic_scale.value)
    steps = compat.local_variable(optimizer.step_counter.value)
    scale.assign(tf.where(is_bad, 0.5 * before, scale))
    steps.assign(tf.where(is_bad, tf.zeros_like(steps), steps))
