"""What happens inside of a model: losses that layers add, and their state.

Both are measured on the first batch, where there is any: the model is called on
rows together, and in two parts.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import coupling
from keras_accum import rows as row_counts
from keras_accum import trial
from keras_accum.coupling import Kind
from keras_accum.coupling import Measured
from keras_accum.findings import Findings

# How far values may be apart by rounding, within a model that computes in
# single precision, and in half.
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2


def with_inner_state(
    findings: Findings, model: keras.Model, x, whole: trial.Trial
) -> Findings:
    """Returns findings, with those of added losses and of layers' state.

    Args:
        findings: Of the losses.
        model: The model.
        x: Inputs, which begin with those of `whole`.
        whole: What came of a call of the model.
    """
    variables = states_of(model, whole)
    if not whole.added and not variables:
        return findings
    rows = int(row_counts.number_of_rows(whole.y_pred))
    x = row_counts.take(x, 0, rows)
    tolerance = tolerance_of(model)
    kinds = [{Kind.ROW_MEAN, Kind.SUM} for _ in whole.added]
    told = [False] * len(kinds)
    varies, wrong = set(), set()
    # What differs without a reason, such as by draws of its own, tells nothing.
    again = trial.of_part(model, x, 0, rows, whole)
    is_noisy = [
        not as_measured(loss).agrees([as_measured(other)], (1.0,), tolerance)
        for loss, other in zip(whole.added, again.added, strict=True)
    ]
    for cut in coupling.cuts(rows) if rows > 1 else ():
        parts = [
            trial.of_part(model, x, *bounds, whole)
            for bounds in ((0, cut), (cut, rows))
        ]
        # As micro-batches assign, one after the other.
        state = [
            (variable, parts[0].assigned[id(variable)])
            for variable in variables.values()
            if id(variable) in parts[0].assigned
        ]
        last = trial.of_part(model, x, cut, rows, whole, state)
        values = zip(*(each.added for each in (whole, *parts)), strict=True)
        shares = {
            Kind.ROW_MEAN: (cut / rows, 1 - cut / rows),
            Kind.SUM: (1.0, 1.0),
        }
        for index, each in enumerate(values):
            total, *of_parts = map(as_measured, each)
            told[index] |= total.tells
            kinds[index] &= {
                kind
                for kind in kinds[index]
                if total.agrees(of_parts, shares[kind], tolerance)
            }
        varies |= {
            index
            for index, variable in variables.items()
            if not all(
                are_same(part, whole, variable, tolerance) for part in parts
            )
        }
        wrong |= {
            index
            for index, variable in variables.items()
            if not are_same(last, whole, variable, tolerance)
        }
    return dataclasses.replace(
        findings,
        added_by=tuple(whole.added_by),
        added=tuple(
            kind_among(possible) if tells and not noisy else None
            for possible, tells, noisy in zip(
                kinds, told, is_noisy, strict=True
            )
        ),
        # What comes out right one after the other is left alone.
        repeated=tuple(sorted(wrong - varies)),
        driven=tuple(sorted(wrong & varies)),
    )


def mixes_rows(model: keras.Model, x, whole: trial.Trial) -> bool:
    """Returns whether outputs of a row depend on the rows that are with it.

    Other than by BatchNormalization's moments, or in the axis of another row,
    as in a matrix of similarities.

    Args:
        model: The model.
        x: Inputs, which begin with those of `whole`.
        whole: What came of a call of the model.
    """
    rows = int(row_counts.number_of_rows(whole.y_pred))
    if rows < 2:
        return False
    cut = coupling.cuts(rows)[0]
    x = row_counts.take(x, 0, rows)
    part = trial.of_part(model, x, 0, cut, whole)
    # What rows do to each other is little at first, where weights begin next to
    # zero, as those of embeddings do.
    tolerance = tolerance_of(model)
    if not differ(part, whole, cut, rows, tolerance):
        return False
    # What differs without a reason, such as by draws of its own, tells nothing.
    again = trial.of_part(model, x, 0, rows, whole)
    return not differ(again, whole, rows, rows, tolerance)


def differ(
    part: trial.Trial,
    whole: trial.Trial,
    cut: int,
    rows: int,
    tolerance: float,
) -> bool:
    """Returns whether outputs of the first rows are others than the whole's."""
    outputs = (tf.nest.flatten(each.y_pred) for each in (part, whole))
    for some, others in zip(*outputs, strict=True):
        if not isinstance(some, tf.Tensor) or not some.dtype.is_floating:
            continue
        if some.shape[0] != cut or others.shape[0] != rows:
            continue
        axes = zip(some.shape[1:], others.shape[1:], strict=True)
        if some.shape[1:] != others.shape[1:]:
            # The longest of some sequences may not be that of all.
            if cut != rows and (cut, rows) in axes:
                return True
            continue
        some, others = (tf.cast(each, tf.float64) for each in (some, others))
        scale = tf.reduce_max(tf.abs(others)) if tf.size(others) else 0.0
        off = tf.abs(some - others[:cut])
        if tf.reduce_any(off > tolerance * scale):
            return True
    return False


def states_of(model, whole: trial.Trial) -> dict[int, keras.Variable]:
    """Returns the variables that layers assign, by index."""
    return {
        index: variable
        for index, variable in compat.inner_state(model).items()
        if id(variable) in whole.assigned
    }


def tolerance_of(model) -> float:
    """Returns how far values may be apart by rounding."""
    is_half = compat.compute_dtypes(model) & {"float16", "bfloat16"}
    return HALF_TOLERANCE if is_half else TOLERANCE


def as_measured(loss) -> Measured:
    """Returns an added loss, as it counts."""
    return Measured(float(tf.reduce_sum(tf.cast(loss, tf.float64))), [])


def kind_among(possible: set[Kind]) -> Kind | None:
    """Returns the kind of a loss, of the kinds that agree with all calls."""
    if len(possible) > 1:
        return None
    return next(iter(possible), Kind.COUPLED)


def are_same(part, whole, variable, tolerance) -> bool:
    """Returns whether a variable was assigned the same in two calls."""
    some, others = (
        np.asarray(each.assigned.get(id(variable)), "float64")
        for each in (part, whole)
    )
    scale = np.abs(others).max(initial=0.0)
    return bool(np.allclose(some, others, rtol=0, atol=tolerance * scale))
