"""The gradients of a model's trainable weights, as a part of its window."""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum.accumulator import GradientAccumulator
from keras_accum.microbatch import is_same
from keras_accum.window import Part


class Gradients(Part):
    """The sums of the gradients of a model's trainable weights.

    Args:
        model: The model.
        dtype: As for `GradientAccumulator`.

    Attributes:
        accumulator: What sums them; None before the first.
        dtype: As above.
    """

    def __init__(self, model: keras.Model, dtype: str | None) -> None:
        self.accumulator: GradientAccumulator | None = None
        self._model, self.dtype = model, dtype

    @property
    def variables(self) -> list[tf.Variable]:
        """The buffers so far."""
        if self.accumulator is None:
            return []
        return [b for b in self.accumulator.buffers if b is not None]

    def make_accumulator(self) -> GradientAccumulator:
        """Returns an accumulator for the weights that are trainable."""
        variables, made = self._model.trainable_weights, self.accumulator
        # A layer may have been built, or frozen, since the last call.
        if made is None or not is_same(made.variables, variables):
            self.accumulator = GradientAccumulator(variables, self.dtype)
        return self.accumulator

    @property
    def num_microbatches(self) -> int:
        """How many there are in the window so far."""
        return (
            0
            if self.accumulator is None
            else int(self.accumulator.count.numpy())
        )

    def is_empty(self) -> tf.Tensor:
        """Returns whether the window has no micro-batch yet; a bool scalar."""
        return tf.equal(self.make_accumulator().count, 0)

    def sums(self) -> list[tf.Tensor | tf.Variable]:
        """Returns the weight and the buffers."""
        return self.make_accumulator().sums()

    def mean(self, totals: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
        """Returns the gradients of the window's loss.

        Args:
            totals: What the replicas' `sums` add up to.
        """
        weight, *buffers = totals
        # Keras divides losses by the number of replicas.
        return self.make_accumulator().mean(
            [weight / self._num_replicas, *buffers]
        )

    def close(self, totals, applies) -> None:
        """Leaves the buffers to the next micro-batch, which starts them."""
        self.make_accumulator().forget()

    def reset(self) -> None:
        """Forgets what was gathered."""
        if self.accumulator is not None:
            self.accumulator.forget()

    def state(self) -> dict[str, np.ndarray]:
        """Returns the weight, the count and the buffers."""
        # As it stands: a layer may be frozen while it is saved.
        return self.accumulator.state(self._num_replicas)

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless the variables are the same."""
        self.make_accumulator().check_state(state)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the buffers that `state` returned."""
        self.make_accumulator().restore(state, self._num_replicas)

    @property
    def _num_replicas(self):
        return self._model.distribute_strategy.num_replicas_in_sync
