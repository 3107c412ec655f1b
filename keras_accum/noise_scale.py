"""The gradient noise scale: how large a batch is worth having.

The gradient of a batch is that of all data, G, plus noise. Its variance is that
of one row, tr S, over the rows. Where both are as large, the batch has
`B = tr S / |G|^2` rows: with far fewer, twice the rows are nearly as good as
twice the updates; with far more, they are hardly better.

A window tells both. With weights `w` of its k micro-batches, gradients `g` of
these and their weighted mean, as ordinary code:

```python
W, mean = sum(w), sum(w * g) / sum(w)
trace = (sum(w * |g|^2) - W * |mean|^2) / (k - 1)  # tr S
squared_norm = |mean|^2 - trace / W  # |G|^2
```

Both are unbiased, for any weights. The noise scale is the ratio of their means
over windows, which differs from the mean of the ratios. The means are moving
ones. The unit is that of the weights: rows, or tokens.

References:
    - [McCandlish et al., 2018](https://arxiv.org/abs/1812.06162): An Empirical
        Model of Large-Batch Training.
    - [Gray et al., 2024](https://arxiv.org/abs/2411.00999): Normalization
        Layer Per-Example Gradients are Sufficient to Predict Gradient Noise
        Scale in Transformers.
    - [Merrill et al., 2025](https://arxiv.org/abs/2505.23971): Critical Batch
        Size Revisited. It warns that the noise scale tells the order of
        magnitude alone.
    - Fieller, 1954: Some Problems in Interval Estimation.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# The means are over about the last hundred windows.
DECAY = 0.99
# Of 95 %.
QUANTILE = 1.96


class Moments(NamedTuple):
    """Moving sums over windows; float64 scalars.

    A window counts by its weight W: of a larger one |G|^2 is known better.

    Attributes:
        windows: Of 1: how many windows there are, 1 in the end.
        sizes: Of W.
        steps: Of W, for each micro-batch of a replica.
        traces: Of W times tr S.
        norms: Of W times |G|^2.
        squares: Of the square of W, times what it counts.
        square_traces: Of that, times tr S.
        square_norms: Of that, times |G|^2.
        trace_trace: Of that, times tr S squared.
        trace_norm: Of that, times tr S times |G|^2.
        norm_norm: Of that, times |G|^2 squared.
    """

    windows: tf.Tensor
    sizes: tf.Tensor
    steps: tf.Tensor
    traces: tf.Tensor
    norms: tf.Tensor
    squares: tf.Tensor
    square_traces: tf.Tensor
    square_norms: tf.Tensor
    trace_trace: tf.Tensor
    trace_norm: tf.Tensor
    norm_norm: tf.Tensor


class Estimate(NamedTuple):
    """A noise scale, in the unit of the weights, and its 95 % interval."""

    value: tf.Tensor
    low: tf.Tensor
    high: tf.Tensor


def of_window(products, squared_norm, weight, count):
    """Returns tr S and |G|^2, as a window tells; two float64 scalars.

    Args:
        products: The sum of `w * |g|^2`.
        squared_norm: That of the mean gradient.
        weight: The sum of the weights.
        count: The number of micro-batches; nothing is known unless there are
            two.
    """
    products, squared_norm, weight, count = (
        tf.cast(each, tf.float64)
        for each in (products, squared_norm, weight, count)
    )
    trace = tf.math.divide_no_nan(products - weight * squared_norm, count - 1.0)
    return trace, squared_norm - tf.math.divide_no_nan(trace, weight)


def advanced(moments: tf.Tensor, trace, norm, size, step) -> tf.Tensor:
    """Returns the `Moments` after one more window; a float64 vector.

    Args:
        moments: Those before.
        trace: Its tr S.
        norm: Its |G|^2.
        size: Its weight.
        step: Its weight, for each micro-batch of a replica.
    """
    one, trace, norm, size, step = (
        tf.cast(value, tf.float64) for value in (1.0, trace, norm, size, step)
    )
    first = tf.stack([one, size, step, size * trace, size * norm])
    pair = tf.stack([one, trace, norm])
    squares = tf.stack([trace**2, trace * norm, norm**2])
    second = size**2 * tf.concat([pair, squares], axis=0)
    new = tf.constant(1.0 - DECAY, tf.float64)
    kept = tf.constant([DECAY] * 5 + [DECAY**2] * 6, tf.float64)
    added = tf.concat([new * first, new**2 * second], axis=0)
    return kept * moments + added


def estimate(moments: tf.Tensor) -> Estimate:
    """Returns the noise scale and its interval; float64 scalars.

    The interval is that of a ratio of two means (Fieller). It holds each scale
    for which `mean(trace) - scale * mean(norm)` is not told from zero. Where
    |G|^2 may be zero it has no end. All is NaN if there was no window.

    Args:
        moments: The `Moments`, a vector.
    """
    found = Moments(*tf.unstack(moments))
    zero, inf, nan = (
        tf.constant(value, tf.float64) for value in (0.0, math.inf, math.nan)
    )
    trace, norm = found.traces / found.sizes, found.norms / found.sizes
    value = tf.where(
        norm > 0.0, tf.maximum(trace, 0.0) / tf.maximum(norm, 1e-300), inf
    )
    # Of one window nothing is known.
    rest = found.sizes**2 - found.squares
    is_one = rest < 1e-6 * found.squares
    factor = QUANTILE**2 / tf.where(is_one, tf.ones_like(rest), rest)
    tt = factor * (
        found.trace_trace
        - 2.0 * trace * found.square_traces
        + trace**2 * found.squares
    )
    tn = factor * (
        found.trace_norm
        - trace * found.square_norms
        - norm * found.square_traces
        + trace * norm * found.squares
    )
    nn = factor * (
        found.norm_norm
        - 2.0 * norm * found.square_norms
        + norm**2 * found.squares
    )
    square, linear = norm**2 - nn, trace * norm - tn
    discriminant = linear**2 - square * (trace**2 - tt)
    root = tf.sqrt(tf.maximum(discriminant, 0.0))
    # Where it has no end, it begins at the only positive one.
    low = tf.maximum((linear - root) / square, 0.0)
    high = tf.maximum((linear + root) / square, 0.0)
    has_none = is_one | (discriminant < 0.0) | (square == 0.0)
    low = tf.where(has_none, zero, low)
    high = tf.where(has_none | (square < 0.0), inf, high)
    is_known = found.windows > 0.0
    return Estimate(
        *(tf.where(is_known, each, nan) for each in (value, low, high))
    )


def in_steps(moments: tf.Tensor, least: int) -> tf.Tensor:
    """Returns the interval of the noise scale, in steps; a float64 vector.

    A step has a micro-batch of each replica.

    Args:
        moments: The `Moments`, a vector.
        least: How many windows they must be of; both ends are NaN with fewer.
    """
    found = Moments(*tf.unstack(moments))
    _, low, high = estimate(moments)
    # Not exactly: the sums are rounded.
    is_known = found.windows > 1.0 - DECAY ** (least - 0.5)
    step = found.steps / found.windows
    ends = tf.stack([low, high]) / step
    return tf.where(is_known, ends, tf.constant(math.nan, tf.float64))


def enough(size: float, scale: float) -> float:
    """Returns the smallest size that needs at most a tenth more updates.

    Trainings with batches of that size need `1 + scale / size` times the
    updates that those with the largest do (McCandlish et al., equation 2.11).

    Args:
        size: The weight of a window.
        scale: The noise scale.
    """
    return scale / (1.1 * (1.0 + scale / size) - 1.0)


def no_windows() -> np.ndarray:
    """Returns the `Moments` before any window, as a vector."""
    return np.zeros(len(Moments.__annotations__))
