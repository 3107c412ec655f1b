"""`verify`: is a model exact, and if not, why?

As ordinary code:

```python
whole = gradients(model, batch)
parts = [gradients(model, part) for part in uneven_parts(batch)]
distance = norm(whole - weighted_mean(parts)) / norm(whole)
```

The real thing takes the model's own train step, in the way that the model
accumulates, with all random draws made alike, and puts everything back.
"""

import dataclasses
import functools
import warnings
from typing import Any

import keras
import numpy as np

from keras_accum import causes
from keras_accum import compat
from keras_accum import dry_run
from keras_accum import first_batch
from keras_accum import restoring
from keras_accum import trial
from keras_accum import verifiable
from keras_accum.inner import tolerance_of

# How many lines a table has of what is equal up to rounding: a large model has
# hundreds of variables.
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far something is from that of the large batch.

    Attributes:
        name: "loss", or the path of a variable.
        what: "loss", "gradient" or "state".
        distance: Relative to the large batch's: 0 is equal.
        cause: What it comes from, if it is not 0 up to rounding; else "".
        way_out: What to do about it; else "".
    """

    name: str
    what: str
    distance: float
    cause: str = ""
    way_out: str = ""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        exact: Whether all is equal up to rounding.
        differences: Of the loss, of the gradient of each variable, and of each
            other variable that a step assigns; the largest first.
        tolerance: The largest distance that counts as rounding.
    """

    exact: bool
    differences: tuple[Difference, ...]
    tolerance: float

    def __str__(self) -> str:
        """Returns a table, worst first, without most of what is equal."""
        head = "exact" if self.exact else "not exact"
        lines = [
            f"The model is {head}. Micro-batches against the batch at once:",
            "distance  why  what",
        ]
        different = sum(bool(each.cause) for each in self.differences)
        reasons = []
        for each in self.differences[: different + SHOWN]:
            mark = ""
            if each.cause:
                reason = f"{each.cause}. What to do: {each.way_out}."
                if reason not in reasons:
                    reasons.append(reason)
                mark = f"({1 + reasons.index(reason)})"
            is_loss = each.what == "loss"
            name = "loss" if is_loss else f"{each.what} of {each.name}"
            lines.append(f"{each.distance:8.1e}  {mark:3}  {name}")
        more = len(self.differences) - different - SHOWN
        if more > 0:
            lines.append(f"and {more} more, all within {self.tolerance:.0e}")
        lines += [
            f"({number}) {reason}" for number, reason in enumerate(reasons, 1)
        ]
        return "\n".join(lines)


def verify(
    model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None
) -> Verification:
    """Finds out whether a model accumulates exactly, and if not, why.

    It makes the model's own train step on a batch, whole and in uneven
    micro-batches, eagerly, and compares what the optimizer would get. Random
    draws are made alike. Nothing changes: neither weights, optimizer, metrics,
    random states nor the window that the model is in; but a `tf.Variable` that
    a step assigns, and that is no attribute of the model or of a layer.

    Args:
        model: A compiled model that accumulates, in either way.
        x: Inputs: nested arrays or tensors with rows along the first axis, at
            least 3. A task of KerasHub preprocesses them as in `fit`.
        y: Labels, or None.
        sample_weight: Sample weights, or None.

    Returns:
        A `Verification`. `print` shows it as a table.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If the model does not accumulate, is not compiled, or the
            data is not one batch of at least 3 rows.

    Example:

    ```python
    print(keras_accum.verify(model, x[:16], y[:16]))
    ```
    """
    data = verifiable.data_of(model, x, y, sample_weight)
    rows = first_batch.rows_of(data)
    verifiable.check(model, rows)
    few = max(1, round(rows * 3 / 16))
    uneven = (0, few, rows - max(1, round(rows * 5 / 16)), rows)
    tolerance = tolerance_of(model)
    with (
        restoring.unchanged(model),
        trial.drawing_alike(in_all_threads=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        whole = dry_run.run(model, data, (0, rows))
        parts = dry_run.run(model, data, uneven)
        with compat.normalizing_by_moving_statistics(model):
            fixed = {
                (each.what, each.name): each.distance
                for each in compare(
                    dry_run.run(model, data, (0, rows)),
                    dry_run.run(model, data, uneven),
                )
            }

        @functools.cache
        def other_cause(what):
            if what == "state" and causes.assigns_itself(model, parts):
                return causes.OWN_STATE
            if parts.findings is not None:
                return causes.cause_of(model, parts)
            return causes.own_cause(
                lambda weight_of: (
                    distance_of_gradients(
                        whole, dry_run.run(model, data, uneven, weight_of)
                    )
                    <= tolerance
                )
            )

        found = [
            each
            if each.distance <= tolerance
            else explained(each, fixed, tolerance, other_cause)
            for each in compare(whole, parts)
        ]
    found.sort(key=lambda each: -np.nan_to_num(each.distance, nan=np.inf))
    exact = all(not each.cause for each in found)
    return Verification(exact, tuple(found), tolerance)


def explained(difference, fixed, tolerance, other_cause) -> Difference:
    """Returns a difference with its cause.

    Args:
        difference: What is not equal.
        fixed: Distances with the moments of BatchNormalization fixed.
        tolerance: What counts as rounding.
        other_cause: Returns a cause and a way out, if it is not that, of what
            a difference is of.
    """
    is_by_design = fixed[difference.what, difference.name] <= tolerance
    cause, way_out = (
        causes.BY_DESIGN if is_by_design else other_cause(difference.what)
    )
    return dataclasses.replace(difference, cause=cause, way_out=way_out)


def compare(whole: dry_run.Result, parts: dry_run.Result) -> list[Difference]:
    """Returns how far the micro-batches are from the whole."""
    found = []
    if whole.loss is not None and parts.loss is not None:
        off = distance(np.asarray(parts.loss), np.asarray(whole.loss))
        found.append(Difference("loss", "loss", off))
    largest = max(map(np.linalg.norm, whole.gradients.values()), default=0.0)
    for path, gradient in whole.gradients.items():
        # Of a gradient that is next to nothing only rounding is left.
        off = distance(parts.gradients[path], gradient, 1e-2 * largest)
        found.append(Difference(path, "gradient", off))
    for path, value in whole.state.items():
        if path not in whole.assigned | parts.assigned:
            continue
        off = distance(parts.state[path], value)
        found.append(Difference(path, "state", off))
    return found


def distance(actual, expected, floor=0.0) -> float:
    """Returns the distance of two arrays, relative to the second."""
    off = np.linalg.norm(actual - expected)
    scale = max(np.linalg.norm(expected), floor)
    return float(off / scale) if off else 0.0


def distance_of_gradients(
    whole: dry_run.Result, parts: dry_run.Result
) -> float:
    """Returns the largest distance of a gradient."""
    found = compare(whole, parts)
    return max(each.distance for each in found if each.what == "gradient")
