"""Whether a loss is a mean over the rows, a sum, or couples rows: measured.

As ordinary code, for a batch in two parts:

```python
whole = loss(y, y_pred)
parts = [loss(y[:cut], y_pred[:cut]), loss(y[cut:], y_pred[cut:])]
is_sum = whole == sum(parts)
is_mean = whole == numpy.average(parts, weights=[cut, rows - cut])
couples_rows = not (is_sum or is_mean)
```

The real thing compares the gradients as well, cuts at two places, and does it
with two kinds of outputs: one comparison may agree by chance.
"""

import dataclasses
import enum
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_accum.sample import Sample

# How far the value of a batch may be from what its parts give: rounding.
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4
# Below this a loss tells nothing.
LEAST = 1e-7


class Kind(enum.Enum):
    """How the loss of a batch follows from the losses of its parts."""

    # The mean, weighted by the loss's denominators.
    MEAN = "mean by denominators"
    # The mean, weighted by the rows.
    ROW_MEAN = "mean over rows"
    SUM = "sum"
    # In no such way.
    COUPLED = "coupled"


def kind_of(
    loss: Callable[[Sample], tf.Tensor],
    weights: Mapping[Kind, Callable[[Sample], float]],
    sample: Sample,
) -> Kind | None:
    """Measures how the loss of a batch follows from the losses of its parts.

    Args:
        loss: A function of a `Sample`: a scalar.
        weights: For each kind that is possible, how much a part counts; the
            most likely kind first.
        sample: Some rows. One row is made two.

    Returns:
        The first kind that agrees, `Kind.COUPLED` if none does, or None if that
        cannot be told: the loss is zero, or not finite.

    Raises:
        Exception: Of any kind, as the loss of all of the sample.
    """
    if sample.rows == 1:
        sample = sample.twice()
    possible, told = dict(weights), False
    places = cuts(sample.rows)
    for each, where in (
        (sample, places),
        (sample.with_other_outputs(), places[:1]),
    ):
        whole = measured(loss, each)
        if not (whole.is_finite and whole.tells):
            continue
        if each is sample and not whole.agrees([measured(loss, each)], [1.0]):
            # It draws in a way of its own.
            return None
        for cut in where:
            parts = [each.part(0, cut), each.part(cut, each.rows)]
            try:
                found = [measured(loss, part) for part in parts]
            except Exception:  # noqa: BLE001
                # Of other numbers of rows it cannot be computed.
                return Kind.COUPLED
            if not all(part.is_finite for part in found):
                # As the mean over entries of which a part has none.
                continue
            told = True
            for kind in list(possible):
                shares = [float(possible[kind](part)) for part in parts]
                if kind is not Kind.SUM:
                    total = sum(shares) or 1.0
                    shares = [share / total for share in shares]
                if not whole.agrees(found, shares):
                    del possible[kind]
    return next(iter(possible), Kind.COUPLED) if told else None


@dataclasses.dataclass(frozen=True)
class Measured:
    """A loss, and its gradients by the model's outputs.

    Attributes:
        value: The loss.
        gradients: Arrays with a row for each of the batch.
    """

    value: float
    gradients: list[np.ndarray]

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(np.isfinite(each).all() for each in self._arrays)

    @property
    def tells(self) -> bool:
        """Whether there is anything to compare: not all are zeros."""
        return any(
            np.abs(each).max(initial=0.0) > LEAST for each in self._arrays
        )

    @property
    def _arrays(self):
        return [np.asarray(self.value), *self.gradients]

    def agrees(
        self,
        parts: "Sequence[Measured]",
        shares: Sequence[float],
        tolerance: float = VALUE_TOLERANCE,
    ) -> bool:
        """Returns whether this is the sum of its parts, each by its share."""
        summands = [
            share * part.value
            for share, part in zip(shares, parts, strict=True)
        ]
        scale = max(abs(self.value), *map(abs, summands))
        off = abs(self.value - sum(summands))
        if not off <= tolerance * scale + LEAST:
            return False
        for index, gradient in enumerate(self.gradients):
            joined = np.concatenate(
                [
                    share * part.gradients[index]
                    for share, part in zip(shares, parts, strict=True)
                ]
            )
            off = np.linalg.norm(gradient - joined)
            if not off <= GRADIENT_TOLERANCE * np.linalg.norm(gradient) + LEAST:
                return False
        return True


def measured(loss: Callable[[Sample], tf.Tensor], sample: Sample) -> Measured:
    """Computes a loss, and its gradients by the outputs."""
    leaves = [
        leaf
        for leaf in tf.nest.flatten(sample.y_pred)
        if isinstance(leaf, tf.Tensor) and leaf.dtype.is_floating
    ]
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        value = tf.reduce_sum(tf.cast(loss(sample), tf.float64))
    gradients = tape.gradient(
        value, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    return Measured(
        float(value),
        [
            tf.convert_to_tensor(gradient).numpy().astype("float64")
            for gradient in gradients
        ],
    )


def cuts(rows: int) -> list[int]:
    """Returns where to cut a batch in two, unevenly."""
    few = max(1, round(rows * 5 / 16)), max(1, round(rows * 3 / 16))
    return sorted({few[0], rows - few[1]} - {0, rows})
