"""One gradient, dense or of some rows: its weight, and its place in a sum."""

import tensorflow as tf

from keras_accum import compat
from keras_accum import outer_products
from keras_accum import replicas
from keras_accum.annotations import Gradient


def as_gradient(value) -> Gradient:
    """Converts `value` to a tensor, unless it is rows or None."""
    if value is None or isinstance(value, tf.IndexedSlices):
        return value
    return tf.convert_to_tensor(value)


def values_of(gradient) -> tf.Tensor:
    """Returns the values of a gradient, of all rows or of some."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient.values
    return tf.convert_to_tensor(gradient)


def with_values(gradient, values) -> Gradient:
    """Returns a gradient of the same kind with other values."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


def weighted(gradient, weight, dtype) -> Gradient:
    """Returns `weight * gradient` in `dtype`."""
    return with_values(
        gradient, tf.cast(values_of(gradient), dtype) * tf.cast(weight, dtype)
    )


def add_two(gradient, other) -> Gradient:
    """Returns the sum of two gradients, each of which may be None."""
    if gradient is None or other is None:
        return other if gradient is None else gradient
    return tf.convert_to_tensor(gradient) + tf.convert_to_tensor(other)


def keep_unless(first, value) -> tf.Tensor:
    """Returns `value`, or zeros if `first`; a NaN is forgotten too."""
    # One zero: TensorFlow would make constants of zeros as large as `value`
    # when it prepares a program for XLA.
    value = tf.convert_to_tensor(value)
    return tf.where(first, tf.zeros((), value.dtype), value)


def clear(variable, first) -> None:
    """Sets a variable to zero if `first`."""
    if first is True:
        variable.assign(compat.zeros(variable.shape, variable.dtype))
    elif first is not False:
        variable.assign(keep_unless(first, variable))


def select_all(condition: tf.Tensor, gradients, others) -> list[Gradient]:
    """Returns `gradients`, or `others` unless a condition holds.

    XLA selects while it adds to the buffers; a `tf.cond` would come between.

    Args:
        condition: A bool scalar.
        gradients: Of any kind.
        others: One for each; None stands for zeros.
    """

    def select(gradient, other):
        values = values_of(gradient)
        # One zero, as in `keep_unless`.
        other = 0 if other is None else values_of(other)
        other = tf.cast(other, values.dtype)
        return with_values(gradient, tf.where(condition, values, other))

    return [
        None if gradient is None else select(gradient, other)
        for gradient, other in zip(gradients, others, strict=True)
    ]


def choose_all(condition: tf.Tensor, gradients, others) -> list[Gradient]:
    """Selects as `select_all`, by a conditional.

    There is no pass over the memory, as `tf.where` would make.
    """
    pairs = [
        (values_of(gradient), other)
        for gradient, other in zip(gradients, others, strict=True)
        if gradient is not None
    ]
    if not pairs:
        return list(gradients)
    values = iter(
        tf.cond(
            condition,
            lambda: [value for value, _ in pairs],
            lambda: [
                compat.zeros(tf.shape(value), value.dtype)
                if other is None
                else tf.cast(values_of(other), value.dtype)
                for value, other in pairs
            ],
        )
    )
    return [
        None if gradient is None else with_values(gradient, next(values))
        for gradient in gradients
    ]


def add(variable, buffer, gradient, weight, first) -> None:
    """Adds a weighted gradient, of either kind or None, to its buffer.

    Args:
        variable: What the gradient belongs to.
        buffer: The sum so far; None if there was no gradient yet.
        gradient: The gradient.
        weight: A scalar; None for 1.
        first: Whether to start the buffer: a bool, or a bool scalar.
    """
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
        if not replicas.on_tpu(tf.distribute.get_strategy()):
            add_rows(buffer, gradient, first)
            return
        # There the copies have no names of their own, to scatter to.
        gradient = tf.convert_to_tensor(gradient)
    if first is True:
        buffer.assign(gradient)
    elif first is False:
        buffer.assign_add(gradient)
    else:
        buffer.assign(keep_unless(first, buffer) + gradient)


def add_maximum(buffer, gradient, first) -> None:
    """Keeps the larger of each entry, or starts the buffer."""
    if first is not True:
        # Zeros, if `first`: such values are not negative.
        before = buffer if first is False else keep_unless(first, buffer)
        gradient = tf.maximum(before, gradient)
    buffer.assign(gradient)


def add_rows(buffer, gradient, first) -> None:
    """Adds rows to a buffer, by scatter; the other rows are not touched."""
    if isinstance(first, bool):
        clear(buffer, first)
    else:
        # To select would touch all rows, every time.
        tf.cond(first, lambda: clear(buffer, True), lambda: None)
    # A variable on several replicas has no `scatter_add`; each of them has.
    compat.local_variable(buffer).scatter_add(gradient)


def buffer_dtype(variable_dtype: str, requested: str | None) -> tf.DType:
    """Returns the dtype in which gradients of a variable are summed.

    Half precision loses what is added to a sum that has grown: bfloat16 keeps
    8 bits, so the 257th equal summand changes nothing. Hence float32, unless
    the variable is wider or the user says otherwise.
    """
    if requested is not None:
        return tf.as_dtype(requested)
    dtype = tf.as_dtype(variable_dtype)
    return tf.float32 if dtype.size < tf.float32.size else dtype


def check_lengths(gradients, variables, advice: str = "") -> None:
    """Raises a `ValueError` unless each variable has its gradient.

    Args:
        gradients: The gradients.
        variables: The variables.
        advice: What to write instead; a sentence.
    """
    if len(gradients) != len(variables):
        raise ValueError(
            "`gradients` must have one entry per variable, None where there "
            f"is no gradient. Received: {len(gradients)} gradients for "
            f"{len(variables)} variables.{advice}"
        )


def check_shapes(gradients, variables) -> None:
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


def check_weight(weight) -> None:
    """Raises a `ValueError` unless `weight` is a scalar or `None`."""
    if weight is None:
        return
    shape = tf.convert_to_tensor(weight).shape
    if not shape.is_compatible_with(()):
        raise ValueError(
            f"`weight` must be a scalar. Received: shape={tuple(shape)}"
        )
