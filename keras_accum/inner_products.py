"""Inner products of gradients, which have as many entries as the weights.

As ordinary code:

```python
sum(np.vdot(gradient, other) for gradient, other in zip(gradients, others))
```

A gradient is read once more for it. On a CPU, that of a dense layer with few
rows is not: of `x^T dy` the squared norm is `<x x^T, dy dy^T>`, of two matrices
with a column for each row.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_accum import compat
from keras_accum import outer_products
from keras_accum.annotations import Gradient

# XLA on a CPU sums up fast along rows of about that length.
LENGTHS = (1024, 512, 256, 128, 64)


def inner_product(
    some: Sequence[Gradient], others: Sequence[Gradient], on_cpu: bool = False
) -> tf.Tensor:
    """Returns the inner product of two lists of gradients; a float32 scalar.

    Args:
        some: Gradients, dense or of rows; None stands for zeros.
        others: Of the same variables; the same list for the squared norm.
        on_cpu: Whether they are on a CPU.
    """
    products = [
        product(one, other, on_cpu)
        for one, other in zip(some, others, strict=True)
        if one is not None and other is not None
    ]
    return tf.add_n(products) if products else tf.zeros(())


def product(one: Gradient, other: Gradient, on_cpu: bool) -> tf.Tensor:
    """Returns the inner product of two gradients; see `inner_product`."""
    is_same = one is other
    if is_same and isinstance(one, tf.IndexedSlices):
        one = other = summed_rows(one)
    elif isinstance(other, tf.IndexedSlices):
        one = tf.gather(tf.convert_to_tensor(one), other.indices)
        other = other.values
    elif isinstance(one, tf.IndexedSlices):
        return product(other, one, on_cpu)
    if is_same and on_cpu:
        factors = outer_products.factors(one)
        if factors is not None and is_cheaper(*factors):
            one, other = (
                tf.matmul(factor, factor, transpose_b=True)
                for factor in factors
            )
            return total(one * other)
    one, other = tf.cast(one, tf.float32), tf.cast(other, tf.float32)
    if not compat.is_compiled_by_xla():
        if is_same:
            return 2.0 * tf.nn.l2_loss(one)
        return total(one * other)
    return along_rows(one * other) if on_cpu else total(one * other)


def summed_rows(rows: tf.IndexedSlices) -> tf.Tensor:
    """Returns rows with the sum of each index once, and zeros elsewhere."""
    order = tf.argsort(rows.indices)
    indices = tf.gather(rows.indices, order)
    # The first is compared with the last, and equal if all are.
    is_new = tf.not_equal(indices, tf.roll(indices, 1, axis=0))
    rank = tf.cumsum(tf.cast(is_new, tf.int32))
    values = tf.gather(tf.cast(rows.values, tf.float32), order)
    return tf.math.unsorted_segment_sum(values, rank, tf.size(rank) + 1)


def is_cheaper(x: tf.Tensor, dy: tf.Tensor) -> bool:
    """Returns whether the products of rows are less work than to read `x^T dy`.

    An entry that is read takes about as long as 8 multiplications.
    """
    rows, width, height = x.shape[0], x.shape[1], dy.shape[1]
    if None in (rows, width, height):
        return False
    return rows**2 * (width + height) <= 4 * width * height


def total(values: tf.Tensor) -> tf.Tensor:
    """Returns the sum of all entries, in float32."""
    return tf.cast(tf.reduce_sum(values), tf.float32)


def along_rows(values: tf.Tensor) -> tf.Tensor:
    """Returns the sum of all entries, as matrix products with ones.

    XLA on a CPU adds one number after the other where it reduces to a scalar,
    which takes six times as long.
    """
    size = values.shape.num_elements()
    length = next((n for n in LENGTHS if size and size % n == 0), None)
    if length is None:
        return tf.reduce_sum(values)
    rows = tf.reshape(values, [-1, length])
    return tf.reduce_sum(tf.matmul(rows, tf.ones([length, 1], values.dtype)))
