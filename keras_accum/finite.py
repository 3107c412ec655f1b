"""Whether there is a NaN or an infinity in gradients.

As ordinary code:

```python
all(np.isfinite(gradient).all() for gradient in gradients)
```

That reads all gradients once more, and makes XLA write out what it would have
added to the buffers at once. On a CPU a matrix product is not read where its
factors are much smaller. They are read instead, and bound the product. Only
beyond the bound the product itself is computed and read.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_accum import outer_products
from keras_accum.gradients import values_of


def all_finite(gradients: Sequence, looks_at_factors=False) -> tf.Tensor:
    """Returns whether gradients have no NaN and no infinity; a bool scalar.

    Args:
        gradients: Of any kind.
        looks_at_factors: Whether to look first at the factors of gradients
            that are matrix products. There is much less to read, but it takes a
            conditional.
    """
    values = [values_of(g) for g in gradients if g is not None]
    found, products = [], []
    for value in values:
        product = small_factors(value) if looks_at_factors else None
        if product is None:
            found.append(is_finite(value))
        else:
            products.append(product)
    if products:
        # The factors go into the branch, where the products are made again:
        # they themselves would have to be written out for it.
        found.append(
            tf.cond(
                tf.reduce_all([is_bounded(*product) for product in products]),
                lambda: tf.constant(True),
                lambda: tf.reduce_all(
                    [
                        is_finite(tf.matmul(x, dy, transpose_a=True))
                        for x, dy in products
                    ]
                ),
            )
        )
    return tf.reduce_all(tf.stack(found)) if found else tf.constant(True)


def small_factors(value):
    """Returns a matrix product's factors, if they are much less to read."""
    product = outer_products.factors(value)
    if product is None or not value.shape.is_fully_defined():
        return None
    size = sum(factor.shape.num_elements() or math.inf for factor in product)
    return product if 8 * size <= value.shape.num_elements() else None


def is_bounded(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """Returns whether `x^T dy` is finite for certain; a bool scalar.

    No entry is larger than the product of the factors' norms (Cauchy, Schwarz).
    A NaN is not less than anything.
    """
    return norm(x) * norm(dy) < tf.constant(1e37, x.dtype)


def norm(value: tf.Tensor) -> tf.Tensor:
    """Returns the Frobenius norm; a scalar."""
    # As a matrix product, for the reason that `is_finite` has.
    row = tf.reshape(value, [1, -1])
    return tf.sqrt(tf.squeeze(tf.matmul(row, row, transpose_b=True)))


def is_finite(value: tf.Tensor) -> tf.Tensor:
    """Returns whether a tensor has no NaN and no infinity; a bool scalar."""
    is_narrow = value.dtype not in (tf.float32, tf.float64)
    if value.shape.rank is None or value.shape.rank < 2 or is_narrow:
        return tf.reduce_all(tf.math.is_finite(value))
    # XLA on a CPU reduces to a scalar one number after the other, and makes a
    # matrix product as fast as memory is. The factor is small enough for no
    # finite sum to overflow, and not zero, which a compiler might see through.
    rows = tf.reshape(value, [-1, value.shape[-1]])
    factor = tf.fill([value.shape[-1], 1], tf.constant(1e-30, value.dtype))
    return tf.reduce_all(tf.math.is_finite(tf.linalg.matmul(rows, factor)))
