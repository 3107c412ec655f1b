"""The noise of a window's gradients, as a part of it.

As ordinary code, for one loss:

```python
for microbatch in window:
    product += weight * norm(gradient) ** 2
    total, count = total + weight, count + 1
noise_scale.of_window(product, norm(mean) ** 2, total, count)
```

If a step has several losses, each with a denominator of its own, their shares
in the window's gradient are known at its end alone. Until then the products of
each pair of losses are summed, and the unit is rows.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import loss_sums
from keras_accum import noise_scale
from keras_accum import replicas
from keras_accum import warned
from keras_accum import weighting
from keras_accum.checks import NOISE_SCALE
from keras_accum.known_noise import KnownNoise
from keras_accum.loss_sums import LossSum
from keras_accum.losses import Losses
from keras_accum.microbatch import Microbatch
from keras_accum.options import Options
from keras_accum.window import Part
from keras_accum.window_gradients import Gradients

# The number of micro-batches of a window of which not all were seen.
UNSEEN = -1e9


class WindowNoise(Part):
    """How large a batch is worth having, as the windows so far tell.

    Args:
        model: The model.
        options: Its options.
        gradients: What its window has of gradients.
        losses: What is known of its losses.

    Attributes:
        options: As above.
        known: What all windows tell.
    """

    def __init__(
        self,
        model: keras.Model,
        options: Options,
        gradients: Gradients,
        losses: Losses,
    ) -> None:
        self._model, self.options = model, options
        self._gradients, self._known_losses = gradients, losses
        # Of this window, summed over replicas: its weight and the number of its
        # micro-batches, and what pairs of losses have.
        self._counts: tf.Variable | None = None
        self._products: dict[tuple[int, int], tf.Variable] = {}
        self.known = KnownNoise(model)

    @property
    def is_measured(self) -> bool:
        """Whether anybody wants to know it."""
        options = self.options
        return options.follows_noise or NOISE_SCALE in options.window_metrics

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables so far."""
        return [*self._window, *self.known.variables]

    @property
    def _window(self):
        """The variables of this window."""
        if self._counts is None:
            return []
        return [self._counts, *self._products.values()]

    def make_variables(self) -> None:
        """Makes the variables that are there always, unless they exist."""
        if not self.is_measured or self._counts is not None:
            return
        self._counts = replicas.on_each(
            self._model.distribute_strategy,
            lambda: replicas.sum_variable(tf.zeros((2,)), "noise_counts"),
        )
        self.known.make_variables()

    def add(self, microbatch: Microbatch) -> None:
        """Adds a micro-batch's share in the noise."""
        if not self.is_measured or not microbatch.calls:
            return
        self.make_variables()
        calls = self._gradients.find(microbatch)
        if (
            microbatch.whole is not None
            or self._known_losses.found.couples_rows
        ):
            self._known_losses.warn_once(warned.NO_NOISE_SCALE)
            self._counts.assign_add([0.0, UNSEEN])
            return
        size = loss_sums.size_of(microbatch, list(calls.values()))
        is_sample = size > 2 * weighting.LEAST_WEIGHT
        counts = tf.stack([size, tf.cast(is_sample, tf.float32)])
        self._counts.assign_add(microbatch.or_nothing(counts))
        on_cpu = replicas.on_cpu(self._counts)
        indices = [
            index
            for index, (objective, _) in enumerate(self._gradients.objectives)
            if objective in calls
        ]
        for i, j in loss_sums.pairs(indices):
            some, others = (
                calls[self._gradients.objectives[index][0]] for index in (i, j)
            )
            if some[0].optimizer is others[0].optimizer:
                product = loss_sums.product_of_calls(some, others, on_cpu)
                product = tf.math.divide_no_nan(product, size)
                product = microbatch.or_nothing(product)
                self._product(i, j).assign_add(product)

    def _product(self, i, j):
        """Returns the variable of a pair of losses, and makes it if new."""
        if (i, j) not in self._products:
            self._products[i, j] = replicas.on_each(
                self._model.distribute_strategy,
                lambda: replicas.sum_variable(tf.zeros(()), "noise_product"),
            )
        return self._products[i, j]

    def sums(self) -> list[tf.Variable]:
        """Returns what is summed over the replicas."""
        if not self.is_measured:
            return []
        self.make_variables()
        return [self.known.share, *self._window]

    def measure(
        self,
        losses: Sequence[LossSum],
        totals: Sequence[tf.Tensor],
        counts: tf.Tensor | bool,
    ) -> None:
        """Adds a window to what is known, within each replica.

        Args:
            losses: What it has of each loss.
            totals: What the `sums` of all replicas add up to.
            counts: Whether it makes an update; a bool scalar.
        """
        if not self.is_measured:
            return
        share, weight_and_count, *products = totals
        weight, count = tf.unstack(weight_and_count)
        products = dict(zip(self._products, products, strict=True))
        product = weight**2 * loss_sums.bilinear(
            losses, lambda i, j: products.get((i, j), tf.zeros(()))
        )
        on_cpu = replicas.on_cpu(self._counts)
        squared_norm = loss_sums.squared_norm(losses, on_cpu)
        trace, norm = noise_scale.of_window(
            product, squared_norm, weight, count
        )
        is_known = tf.math.is_finite(trace) & tf.math.is_finite(norm)
        is_known &= (count > 1.5) & (weight > 0.0) & counts
        num_replicas = self._model.distribute_strategy.num_replicas_in_sync
        step = tf.math.divide_no_nan(weight * num_replicas, count)
        self.known.add(trace, norm, weight, step, is_known, share)

    def close(self, totals, applies) -> None:
        """Forgets the window's share in the noise."""
        for variable in self._window:
            variable.assign(tf.zeros_like(variable))

    def reset(self) -> None:
        """Forgets what the window has so far."""
        for variable in self._window:
            variable.assign(tf.zeros(variable.shape))

    def leave_out(self) -> None:
        """Leaves this window out, of which not all was seen."""
        if self.is_measured and self._gradients.num_microbatches:
            self.make_variables()
            self._assign_total(self._counts, [0.0, UNSEEN])

    def _assign_total(self, variable, value):
        strategy = self._model.distribute_strategy
        replicas.assign_total(strategy, variable, value)

    def restore_known(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues with what is known, as a checkpoint has it at any time."""
        if self.is_measured:
            self.known.restore(state)

    def for_schedule(self) -> tf.Variable | None:
        """Returns `known.steps` if the size of windows follows it, or None."""
        if not self.options.follows_noise:
            return None
        self.make_variables()
        return self.known.steps

    def state(self) -> dict[str, np.ndarray]:
        """Returns the window's share in the noise."""
        if not self.is_measured or self._counts is None:
            return {}
        return {"noise_counts": replicas.total(self._counts)} | {
            f"noise_product_{i}_{j}": replicas.total(variable)
            for (i, j), variable in self._products.items()
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned, if it is there."""
        if not self.is_measured:
            return
        self.make_variables()
        counts = state.get("noise_counts", np.array([0.0, UNSEEN]))
        self._assign_total(self._counts, counts)
        for name, value in state.items():
            if name.startswith("noise_product_"):
                i, j = map(int, name.split("_")[2:])
                self._assign_total(self._product(i, j), value)
