"""The buffers that gather a window's gradients, and the arithmetic on them."""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import outer_products
from keras_accum import replicas

# What a gradient may be: dense, rows of an embedding, or missing.
Gradient = tf.Tensor | tf.IndexedSlices | None


def buffer_dtype(variable_dtype: str, requested: str | None) -> tf.DType:
    """The dtype in which gradients of a variable are summed.

    Half precision loses what is added to a sum that has grown: bfloat16 keeps
    8 bits, so the 257th equal summand changes nothing. Hence float32, unless
    the variable is wider or the user says otherwise.
    """
    if requested is not None:
        return tf.as_dtype(requested)
    dtype = tf.as_dtype(variable_dtype)
    return tf.float32 if dtype.size < tf.float32.size else dtype


def add_dense(buffer, gradient, first):
    """Adds a dense gradient to a buffer, or starts the buffer with it."""
    if first is True:
        buffer.assign(gradient)
    elif first is False:
        buffer.assign_add(gradient)
    else:
        buffer.assign(keep_unless(first, buffer) + gradient)


def add_maximum(buffer, gradient, first):
    """Keeps the larger of each entry, or starts the buffer."""
    if first is not True:
        # Zeros, if `first`: such values are not negative.
        before = buffer if first is False else keep_unless(first, buffer)
        gradient = tf.maximum(before, gradient)
    buffer.assign(gradient)


def add_rows(buffer, gradient, first):
    """Adds rows to a buffer, by scatter; the other rows are not touched."""
    if replicas.on_tpu(tf.distribute.get_strategy()):
        # There the copies have no names of their own.
        add_dense(buffer, tf.convert_to_tensor(gradient), first)
        return
    clear(buffer, first)
    # A variable on several replicas has no `scatter_add`; each of them has.
    compat.own_copy(buffer).scatter_add(gradient)


def clear(buffer, first):
    """Sets a buffer to zero if `first`."""
    if first is True:
        buffer.assign(tf.zeros(buffer.shape, buffer.dtype))
    elif first is not False:
        buffer.assign(keep_unless(first, buffer))


def keep_unless(first, value):
    """`value`, or zeros if `first`; selects, so that a NaN is forgotten."""
    return tf.where(first, tf.zeros_like(value), value)


def add_one(variable, buffer, gradient, weight, first):
    """Adds a weighted gradient, of either kind or None, to its buffer."""
    if gradient is None:
        if buffer is not None:
            clear(buffer, first)
        return
    if compat.is_overwritten(variable):
        add_maximum(buffer, tf.cast(gradient, buffer.dtype), first)
        return
    if compat.is_compiled_by_xla() and replicas.on_cpu(buffer):
        gradient = outer_products.written_out(gradient)
    gradient = weighted(
        gradient, 1.0 if weight is None else weight, buffer.dtype
    )
    if isinstance(gradient, tf.IndexedSlices):
        add_rows(buffer, gradient, first)
    else:
        add_dense(buffer, gradient, first)


def as_gradient(value):
    """`value` as a tensor, unless it is rows or None."""
    if value is None or isinstance(value, tf.IndexedSlices):
        return value
    return tf.convert_to_tensor(value)


def weighted(gradient, weight, dtype):
    """`weight * gradient` in `dtype`, for dense gradients and for rows."""
    weight = tf.cast(weight, dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.cast(gradient.values, dtype) * weight,
            gradient.indices,
            gradient.dense_shape,
        )
    return tf.cast(gradient, dtype) * weight


def after_everything_so_far(gradients):
    """Control inputs that wait for the step so far, so that it can't fail.

    In a graph, TensorFlow runs an assignment as soon as its inputs are there,
    while a check, a metric or a later layer's gradient may still fail: some
    buffers would then hold a micro-batch that never was. An op of type
    NoOp stands for all of them; edges from each to each would be quadratic.
    """
    if tf.executing_eagerly():
        return []
    stateful = compat.stateful_operations()
    if replicas.has_several(tf.distribute.get_strategy()):
        # The other replicas may be in the same graph, and are not waited for.
        here = tf.no_op().device
        stateful = [op for op in stateful if op.device in (here, "")]
    ready = [
        gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        for gradient in gradients
        if gradient is not None
    ]
    with tf.control_dependencies(stateful + ready):
        return [tf.no_op()]


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
    no buffer. `tf.IndexedSlices` are added row by row, not densified. Of what
    overwrites its variable, as float8 training has it, the maximum is kept.

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
                # They are all the same, and nobody has to be asked.
                tf.Variable(
                    tf.zeros((), tf.int64),
                    trainable=False,
                    name="count",
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                ),
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
        gradients: Sequence[Gradient],
        weight: float | tf.Tensor | None = 1.0,
        first: bool | tf.Tensor = False,
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
        gradients = [as_gradient(gradient) for gradient in gradients]
        check_lengths(gradients, self._variables)
        check_shapes(gradients, self._variables)
        check_scalar(weight)
        self._make_buffers(gradients)
        with tf.control_dependencies(after_everything_so_far(gradients)):
            for variable, buffer, gradient in zip(
                self._variables, self._buffers, gradients, strict=True
            ):
                add_one(variable, buffer, gradient, weight, first)
            clear(self._weight, first)
            clear(self._count, first)
            if weight is None:
                self._weight.assign(tf.ones_like(self._weight))
            else:
                self._weight.assign_add(tf.cast(weight, self._weight.dtype))
            self._count.assign_add(1)

    def sums(self) -> list[tf.Tensor | tf.Variable]:
        """What `mean` is made of: the weight, and the buffers that there are.

        Within a replica these are its own, to be summed over all of them. The
        maximum is taken of those of variables that are overwritten by their
        gradients; so that all are in the sum, each has a place there.
        """
        several = replicas.has_several(self._strategy)
        pairs = zip(self._variables, self._buffers, strict=True)
        return [
            self._weight,
            *(
                replicas.placed(buffer, self._strategy)
                if several and compat.is_overwritten(variable)
                else buffer
                for variable, buffer in pairs
                if buffer is not None
            ),
        ]

    def mean(
        self, sums: Sequence[tf.Tensor] | None = None
    ) -> list[tf.Tensor | None]:
        """The weighted mean of the gradients since the last `reset`.

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
        several = replicas.has_several(self._strategy)

        def mean_of(variable, total):
            if not compat.is_overwritten(variable):
                return total * tf.cast(scale, total.dtype)
            return tf.reduce_max(total, axis=0) if several else total

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

    def state(self, parts: int = 1) -> dict[str, np.ndarray]:
        """What was gathered, over all replicas, by name; for `restore`.

        Args:
            parts: What the losses, and so the gradients, were divided by.
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
                value = value * value.dtype.type(parts)
            state[f"buffer_{index}"] = value
        return state

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises a `ValueError` unless `restore` can be given a `state`."""
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

    def restore(self, state: Mapping[str, np.ndarray], parts: int = 1) -> None:
        """Goes on from what was gathered before, by any number of replicas.

        Args:
            state: What `state` returned, of variables of the same shapes.
            parts: What the losses that follow are divided by.

        Raises:
            ValueError: If there is another number of variables, or their
                shapes are others.
        """
        self.check_state(state)
        known = [f"buffer_{index}" for index in range(len(self))]
        self._make_buffers([state.get(name) for name in known])
        self.reset()
        replicas.assign_total(self._strategy, self._weight, state["weight"])
        for count in replicas.copies(self._strategy, self._count):
            count.assign(int(state["count"]))
        for name, variable, buffer in zip(
            known, self._variables, self._buffers, strict=True
        ):
            if name in state:
                value = of_dtype(state[name], buffer.dtype)
                if not compat.is_overwritten(variable):
                    value = value / tf.cast(parts, value.dtype)
                replicas.assign_total(self._strategy, buffer, value)

    def _sums_of_all(self):
        if tf.distribute.in_cross_replica_context():
            return self.sums()
        return replicas.sum_over_replicas(self.sums(), self._weight)

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
        return buffer_dtype(self._variables[index].dtype, self._dtype)


def of_dtype(value, dtype):
    """An array in a dtype. NumPy's files keep the bits of bfloat16 alone."""
    if value.dtype.kind == "V":
        value = value.view(tf.bfloat16.as_numpy_dtype)
    return tf.cast(value, dtype)


def check_lengths(gradients, variables):
    """Raises a `ValueError` unless each variable has its gradient."""
    if len(gradients) != len(variables):
        raise ValueError(
            "`gradients` must have one entry per variable, None where there "
            f"is no gradient. Received: {len(gradients)} gradients for "
            f"{len(variables)} variables."
        )


def check_shapes(gradients, variables):
    """Raises a `ValueError` unless each gradient has its variable's shape."""
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is None:
            continue
        expected = tf.TensorShape(variable.shape)
        if isinstance(gradient, tf.IndexedSlices):
            expected = tf.TensorShape([None]) + expected[1:]
            gradient = gradient.values
        if not expected.is_compatible_with(gradient.shape):
            raise ValueError(
                "`gradients` must have the shapes of their variables. "
                f"Received: shape={tuple(gradient.shape)}, where "
                f"{variable.name} wants {tuple(expected)}."
            )


def check_scalar(weight):
    """Raises a `ValueError` unless `weight` is a scalar or `None`."""
    if weight is None:
        return
    shape = tf.convert_to_tensor(weight).shape
    if not shape.is_compatible_with(()):
        raise ValueError(
            f"`weight` must be a scalar. Received: shape={tuple(shape)}"
        )


def check_dtype(name, dtype):
    """Returns `dtype`, or raises unless it is `None` or a float dtype."""
    if dtype is None:
        return None
    try:
        known = tf.as_dtype(dtype)
    except TypeError:
        known = None
    if known is None or not known.is_floating:
        raise ValueError(
            f"`{name}` must be None or the name of a float dtype, such as "
            f'"float32". Received: {name}={dtype!r}'
        )
    return known.name
