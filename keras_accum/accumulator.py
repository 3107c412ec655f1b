"""The buffers that gather a window's gradients, and the arithmetic on them."""

import functools
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import gradients as arithmetic
from keras_accum import ordering
from keras_accum import reduction
from keras_accum import replicas
from keras_accum.annotations import AnyGradient
from keras_accum.annotations import AnyTensor
from keras_accum.annotations import Weight
from keras_accum.checks import check_dtype
from keras_accum.control_flow import after_all_ops
from keras_accum.gradients import clear


class GradientAccumulator:
    """Weighted sums of gradients, for training loops written by hand.

    It does what these lines do, in buffers that live on the device:

    ```python
    total = sum(weight * gradient for gradient, weight in window)
    mean = total / sum(weight for gradient, weight in window)
    ```

    `GradientAccumulationModel` uses one and needs no care. Use this class
    itself where `fit` does not fit: GANs, two optimizers, reinforcement
    learning.

    Buffers are made when a variable gets its first gradient, in float32 or
    the variable's dtype if that is wider. A variable that never gets one has
    no buffer. `tf.IndexedSlices` are added row by row, not densified. Where
    gradients overwrite a variable, as in float8 training, the maximum is kept.

    Args:
        variables: The `keras.Variable`s or `tf.Variable`s that the gradients
            belong to, in the gradients' order.
        dtype: Dtype of the buffers, as a string. `None` stands for float32, or
            the variable's dtype if that is wider.

    Example:

    ```python
    variables = model.trainable_variables
    accumulator = keras_accum.GradientAccumulator(variables)
    for x, y in microbatches:
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, variables)
        accumulator.add(gradients, weight=len(x))
    optimizer.apply(accumulator.mean(), variables)
    accumulator.reset()
    ```
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable | tf.Variable],
        dtype: str | None = None,
    ) -> None:
        self._variables = list(variables)
        self._dtype = check_dtype("dtype", dtype)
        self._buffers: list[tf.Variable | None] = [None] * len(self._variables)
        # The divisor of a float64 sum must not be rounded to float32.
        dtypes = [self._buffer_dtype(index) for index in range(len(self))]
        widest = tf.float64 if tf.float64 in dtypes else tf.float32
        self._strategy = replicas.strategy_of(self._variables)
        self._weight, self._count = replicas.on_each(
            self._strategy,
            lambda: (
                replicas.sum_variable(tf.zeros((), widest), "weight_sum"),
                replicas.same_variable(tf.zeros((), tf.int64), "count"),
            ),
        )

    def __len__(self) -> int:
        return len(self._variables)

    @property
    def variables(self) -> list[keras.Variable | tf.Variable]:
        """The variables that gradients are gathered for."""
        return list(self._variables)

    @property
    def buffers(self) -> list[tf.Variable | None]:
        """One buffer per variable; `None` where no gradient has come yet."""
        return list(self._buffers)

    @property
    def weight(self) -> tf.Variable:
        """Sum of the weights so far; a float scalar."""
        return self._weight

    @property
    def count(self) -> tf.Variable:
        """Number of micro-batches so far; an int64 scalar."""
        return self._count

    def add(
        self,
        gradients: Sequence[AnyGradient],
        weight: Weight = 1.0,
        first: bool | AnyTensor = False,
    ) -> None:
        """Adds one micro-batch's gradients.

        Args:
            gradients: One per variable, of the variable's shape; a tensor,
                `tf.IndexedSlices`, or `None` where there is no gradient.
            weight: How much this micro-batch counts: the denominator of its
                loss, for a mean over rows their number. A scalar. `None` says
                that the loss is a sum, not a mean: the gradients are added as
                they are, and `mean` divides by 1. All micro-batches of a window
                have weights, or none has.
            first: Whether this is a window's first micro-batch. If so, what
                was gathered before is forgotten in the same pass over the
                memory, and `reset` is not needed. Costs least as a `bool`; a
                bool tensor selects on the device.

        Raises:
            ValueError: If there are not as many gradients as variables, the
                shape of one is not its variable's, or `weight` is no scalar.
        """
        self.add_microbatch([(gradients, weight)], first)

    def add_microbatch(
        self,
        parts: Sequence[tuple[Sequence[AnyGradient], Weight]],
        first: bool | AnyTensor = False,
        total: AnyTensor | None = None,
        waits: bool = True,
    ) -> None:
        """Adds the gradients of one micro-batch, which came in parts.

        Args:
            parts: Any number of gradients and their weight, each as for `add`.
            first: As for `add`; also without any part, it starts the buffers.
            total: What the parts are divided by; None for the sum of their
                weights.
            waits: Whether no buffer changes before nothing can fail. All
                gradients are then in memory at the same time.

        Raises:
            ValueError: As `add`.
        """
        parts = [
            ([arithmetic.as_gradient(gradient) for gradient in gradients], w)
            for gradients, w in parts
        ]
        for gradients, weight in parts:
            arithmetic.check_lengths(gradients, self._variables)
            arithmetic.check_shapes(gradients, self._variables)
            arithmetic.check_weight(weight)
            self._make_buffers(gradients)
        values = [
            arithmetic.values_of(gradient)
            for gradients, _ in parts
            for gradient in gradients
            if gradient is not None
        ]
        last, partial = after_all_ops(values), functools.partial
        # XLA selects while it adds, and plans when memory is free again.
        is_known = isinstance(first, bool) or compat.is_compiled_by_xla()
        groups, before = [range(len(self))], last
        if not (waits or is_known):
            groups, before = ordering.groups(self._variables), []
        adds = [
            (partial(self._add_gradients, parts, group), before)
            for group in groups
        ]
        for add, inputs in [
            *adds,
            (partial(self._add_weights, parts, total), last),
        ]:
            with tf.control_dependencies(inputs):
                if is_known:
                    add(first)
                else:
                    tf.cond(first, partial(add, True), partial(add, False))

    def _add_gradients(self, parts, indices, first):
        """Adds the gradients of some variables, by their indices."""
        starts = first
        for gradients, weight in parts or [([None] * len(self), 0.0)]:
            for index in indices:
                arithmetic.add(
                    self._variables[index],
                    self._buffers[index],
                    gradients[index],
                    weight,
                    starts,
                )
            starts = False

    def _add_weights(self, parts, total, first):
        """Adds the weights, and counts."""
        starts = first
        for _, weight in parts or [(None, 0.0)]:
            clear(self._weight, starts)
            if weight is None:
                self._weight.assign(tf.ones_like(self._weight))
            elif total is None:
                self._weight.assign_add(tf.cast(weight, self._weight.dtype))
            starts = False
        if total is not None:
            self._weight.assign_add(tf.cast(total, self._weight.dtype))
        clear(self._count, first)
        self._count.assign_add(1)

    def sums(self) -> list[tf.Tensor | tf.Variable]:
        """Returns what `mean` needs: the weight, and the buffers so far.

        Within a replica these are its own, to be summed over all replicas. If
        gradients overwrite their variable, `mean` takes the maximum over the
        replicas. Each replica then has its own place in a longer tensor, so
        that the sum holds the buffers of all.
        """
        is_replicated = replicas.has_several(self._strategy)
        pairs = zip(self._variables, self._buffers, strict=True)
        return [
            self._weight,
            *(
                replicas.placed(buffer, self._strategy)
                if is_replicated and compat.is_overwritten(variable)
                else buffer
                for variable, buffer in pairs
                if buffer is not None
            ),
        ]

    def mean(
        self, sums: Sequence[AnyTensor] | None = None
    ) -> list[tf.Tensor | None]:
        """Returns the weighted mean of the gradients since the last `reset`.

        With several replicas it is the mean over all of them, which takes one
        reduction. They all have to call it.

        Args:
            sums: What `sums` of all replicas add up to, if that is known.

        Returns:
            One dense tensor per variable, of its shape and dtype, or `None`
            where no gradient came. Zeros where the weights sum to zero.
        """
        if sums is None:
            sums = self._sums_of_all()
        weight, sums = sums[0], iter(sums[1:])
        scale = tf.math.divide_no_nan(tf.ones_like(weight), weight)
        is_replicated = replicas.has_several(self._strategy)

        def mean_of(variable, total):
            if not compat.is_overwritten(variable):
                return total * tf.cast(scale, total.dtype)
            return tf.reduce_max(total, axis=0) if is_replicated else total

        return [
            None
            if buffer is None
            else tf.cast(mean_of(variable, next(sums)), variable.dtype)
            for buffer, variable in zip(
                self._buffers, self._variables, strict=True
            )
        ]

    def reset(self) -> None:
        """Forgets what was gathered, and sets the buffers to zero."""
        for buffer in self._buffers:
            if buffer is not None:
                clear(buffer, True)
        self.forget()

    def forget(self) -> None:
        """Forgets what was gathered, without a pass over the buffers.

        The next `add` must be given `first`: the buffers still hold the old
        sums.
        """
        clear(self._weight, True)
        clear(self._count, True)

    def state(self, num_replicas: int = 1) -> dict[str, np.ndarray]:
        """Returns what was gathered over all replicas, by name, for `restore`.

        Args:
            num_replicas: The number by which Keras divided the losses, and so
                the gradients.
        """
        state = {
            "variables": np.asarray(len(self)),
            "weight": replicas.total(self._weight),
            "count": replicas.total(self._count),
        }
        for index, (variable, buffer) in enumerate(
            zip(self._variables, self._buffers, strict=True)
        ):
            if buffer is None:
                continue
            if compat.is_overwritten(variable):
                value = replicas.placed(buffer, self._strategy).numpy()
                value = value.max(axis=0)
            else:
                value = replicas.total(buffer)
                value = value * value.dtype.type(num_replicas)
            state[f"buffer_{index}"] = value
        return state

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless `restore` accepts `state`."""
        if int(state["variables"]) != len(self):
            raise ValueError(
                "What was gathered must be of as many variables as there are. "
                f"Received: {int(state['variables'])} variables in the "
                f"checkpoint, where the model has {len(self)}."
            )
        for index, variable in enumerate(self._variables):
            value = state.get(f"buffer_{index}")
            if value is not None and value.shape != tuple(variable.shape):
                raise ValueError(
                    "What was gathered must have the shapes of the variables. "
                    f"Received: shape={value.shape} in the checkpoint, where "
                    f"{variable.name} wants {tuple(variable.shape)}."
                )

    def restore(
        self, state: Mapping[str, np.ndarray], num_replicas: int = 1
    ) -> None:
        """Continues from what any number of replicas gathered before.

        Args:
            state: What `state` returned, of variables of the same shapes.
            num_replicas: The number by which Keras divides later losses.

        Raises:
            ValueError: If there is another number of variables, or their
                shapes are others.
        """
        self.check_state(state)
        names = [f"buffer_{index}" for index in range(len(self))]
        self._make_buffers([state.get(name) for name in names])
        self.reset()
        replicas.assign_total(self._strategy, self._weight, state["weight"])
        for count in replicas.copies(self._strategy, self._count):
            count.assign(int(state["count"]))
        for name, variable, buffer in zip(
            names, self._variables, self._buffers, strict=True
        ):
            if name in state:
                value = of_dtype(state[name], buffer.dtype)
                if not compat.is_overwritten(variable):
                    value = value / tf.cast(num_replicas, value.dtype)
                replicas.assign_total(self._strategy, buffer, value)

    def _sums_of_all(self):
        if tf.distribute.in_cross_replica_context():
            return self.sums()
        return reduction.sum_over_replicas(self.sums(), self._weight)

    def _make_buffers(self, gradients):
        """Makes the buffers of variables that get their first gradient."""
        missing = [
            index
            for index, gradient in enumerate(gradients)
            if gradient is not None and self._buffers[index] is None
        ]
        if not missing:
            return
        made = replicas.on_each(
            self._strategy,
            lambda: [
                replicas.sum_variable(
                    tf.zeros(
                        self._variables[index].shape, self._buffer_dtype(index)
                    ),
                    "gradient_sum",
                )
                for index in missing
            ],
        )
        for index, buffer in zip(missing, made, strict=True):
            self._buffers[index] = buffer

    def _buffer_dtype(self, index):
        return arithmetic.buffer_dtype(
            self._variables[index].dtype, self._dtype
        )


def of_dtype(value, dtype):
    """Converts an array to a dtype."""
    # NumPy's files keep the bits of bfloat16 alone.
    if value.dtype.kind == "V":
        value = value.view(tf.bfloat16.as_numpy_dtype)
    return tf.cast(value, dtype)
