"""What kind of loss each of those given to `compile` is, on some rows."""

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import coupling
from keras_accum import replicas
from keras_accum import weighting
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from keras_accum.sample import Sample


def of_compiled_losses(accumulation, sample: Sample) -> Findings:
    """Measures each of the losses given to `compile`."""
    model = accumulation.model
    compiled = compat.compiled_loss(model)
    if compiled is None:
        return Findings()
    entries = entries_of(compiled, sample)
    # Losses may have variables of their own, such as random states.
    with keras.StatelessScope():
        kinds = [kind_of_entry(*entry) for entry in entries]
        is_replicated = replicas.has_several(model.distribute_strategy)
        undivided = [
            is_replicated
            and kind not in (None, Kind.SUM)
            and not is_divided(*entry)
            for kind, entry in zip(kinds, entries, strict=True)
        ]
        is_apart = not any(
            kind is Kind.COUPLED and looks_at_variables(entry)
            for kind, entry in zip(kinds, entries, strict=True)
        )
    return Findings(tuple(kinds), tuple(undivided), is_apart=is_apart)


def entries_of(compiled, sample: Sample) -> list[tuple]:
    """Returns the losses given to `compile`, each with what it sees."""
    entries = []
    batch = (sample.y, sample.y_pred, sample.sample_weight)
    if not compat.is_built(compiled):
        compat.build_compiled_losses(compiled, *batch)
    compat.map_compiled_losses(
        compiled, lambda *entry: entries.append(entry), *batch
    )
    return entries


def kind_of_entry(loss, y, y_pred, sample_weight) -> Kind | None:
    """Measures one of the losses given to `compile`."""

    def denominator(part):
        return weighting.loss_denominator(
            loss, part.y, part.y_pred, part.sample_weight, part.rows
        )

    sample = Sample(None, y, y_pred, sample_weight)
    try:
        likely = denominator(sample)
    except Exception:  # noqa: BLE001
        # It cannot be computed of these rows alone.
        likely = None
    weights = {Kind.ROW_MEAN: lambda part: part.rows, Kind.SUM: lambda _: 1.0}
    if likely is not None and likely.source is not weighting.GUESS:
        mean = {Kind.MEAN: lambda part: denominator(part).value}
        weights = mean | weights

    def measure(sample):
        return coupling.kind_of(
            lambda part: loss(part.y, part.y_pred, part.sample_weight),
            weights,
            sample,
        )

    kind = measure(sample)
    others = with_zeros(y)
    is_mean = kind in (Kind.MEAN, Kind.ROW_MEAN)
    if is_mean and others is not None and returns_scalar(loss, y, y_pred):
        # A mean over a mask is one over the rows where these have alike.
        try:
            other = measure(Sample(None, others, y_pred, sample_weight))
        except Exception:  # noqa: BLE001
            # It takes no zeros, and so masks none.
            return kind
        kind = other if other is Kind.COUPLED else kind
    return kind


def returns_scalar(loss, y, y_pred) -> bool:
    """Returns whether a loss is reduced before Keras reduces it."""
    if type(loss).__call__ is not keras.Loss.__call__:
        # It may have no `call`, and reduces by itself.
        return True
    return tf.convert_to_tensor(loss.call(y, y_pred)).shape.rank == 0


def with_zeros(y) -> tf.Tensor | None:
    """Returns labels with a zero in half of the rows, which often is masked.

    None for labels of one entry a row, or not of numbers.
    """
    is_dense = isinstance(y, tf.Tensor) and y.shape.rank > 1
    if not is_dense or y.dtype in (tf.string, tf.bool) or y.shape[1] == 1:
        return None
    rows = y.shape[0]
    kept = np.ones((rows, y.shape[1]) + (1,) * (y.shape.rank - 2))
    kept[: rows // 2, 0] = 0
    return y * tf.cast(kept, y.dtype)


def looks_at_variables(entry) -> bool:
    """Returns whether a loss has gradients by more than its arguments."""
    loss, *batch = entry
    with tf.GradientTape() as tape:
        loss(*batch)
    return bool(tape.watched_variables())


def is_divided(loss, y, y_pred, sample_weight) -> bool:
    """Returns whether Keras divides a loss by the number of replicas."""
    value = loss(y, y_pred, sample_weight)
    with compat.as_on_one_replica():
        undivided = loss(y, y_pred, sample_weight)
    return not np.allclose(value, undivided, rtol=1e-3, atol=0)
