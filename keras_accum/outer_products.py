"""Matrix products of few rows, written so that XLA on a CPU stores none.

The gradient of a dense layer's kernel is `x^T dy`, which sums an outer product
for each row. As a matrix product XLA on a CPU writes it to scratch memory, and
reads it again to add it to the buffer:

```python
product = x^T dy                      # writes P bytes
buffer += product                     # reads 2P, writes P
```

Outer products are arithmetic on single entries, which XLA puts into the loop
that adds:

```python
buffer += sum(outer(x[r], dy[r]) for r in range(rows))  # reads P, writes P
```

With few rows the time is that of the memory, and the arithmetic is free. With
more a matrix product is faster: a window of `benchmarks/compare.py`'s MLP takes
0.85 of the time with 2 rows, 0.87 with 4, and 1.06 with 8.
"""

import tensorflow as tf

# Most rows whose products are written out.
ROWS = 4


def factors(gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor] | None:
    """Returns the factors of a gradient: `x` and `dy`, if it is `x^T dy`.

    Args:
        gradient: Of any shape and origin.

    Returns:
        Two matrices with a row for each outer product, or None if it is no
        matrix product, or that is not known.
    """
    if not tf.is_symbolic_tensor(gradient) or gradient.op.type != "MatMul":
        return None
    # Half precision would round each partial sum, and has other bounds.
    if gradient.dtype.size < tf.float32.size:
        return None
    x, dy = gradient.op.inputs
    if not gradient.op.get_attr("transpose_a"):
        x = tf.transpose(x)
    if gradient.op.get_attr("transpose_b"):
        dy = tf.transpose(dy)
    return x, dy


def written_out(gradient: tf.Tensor) -> tf.Tensor:
    """Returns `gradient`, as a sum of outer products where that is faster.

    For programs that XLA compiles for a CPU.

    Args:
        gradient: Of any shape and origin. Only the matrix product of few rows
            is written otherwise, or a `tf.where` that selects one.

    Returns:
        A tensor of the same values, up to rounding.
    """
    if tf.is_symbolic_tensor(gradient) and gradient.op.type == "SelectV2":
        condition, chosen, other = gradient.op.inputs
        return tf.where(condition, written_out(chosen), other)
    product = factors(gradient)
    if product is None:
        return gradient
    x, dy = product
    rows = x.shape[0]
    if rows is None or rows > ROWS:
        return gradient
    return tf.add_n([x[r, :, None] * dy[r] for r in range(rows)])
