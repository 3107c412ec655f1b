"""What `verify` and `plan` take: a compiled model, and rows to cut."""

from typing import Any

import keras

from keras_accum import compat
from keras_accum import rows as row_counts
from keras_accum.checks import check_model


def data_of(model, x: Any, y: Any, sample_weight: Any) -> tuple:
    """Returns a batch as `fit` gives it to `train_step`.

    A task of KerasHub preprocesses in `fit` what `train_step` gets.

    Raises:
        TypeError: If the model is none of Keras's.
        ValueError: If it is no batch: a dataset, say, has many.
    """
    check_model(model)
    preprocess = getattr(
        model, "preprocess_samples", keras.utils.pack_x_y_sample_weight
    )
    data = preprocess(x, y, sample_weight)
    try:
        return row_counts.as_tensors(data)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`x`, `y` and `sample_weight` must be one batch, as nested arrays "
            "or tensors. Of a dataset or a generator give the first one: "
            "`x, y = next(iter(dataset))`. "
            f"Received: {keras.tree.map_structure(type, data)}"
        ) from error


def check_rows(model, rows: int | None) -> None:
    """Raises a `ValueError` unless a compiled model has rows to cut.

    Args:
        model: The model.
        rows: How many there are; None if `x`, `y` and `sample_weight` differ.
    """
    if not model.compiled:
        raise ValueError("`model` must be compiled. Call `model.compile`.")
    if rows is None:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have the same number of rows "
            "along the first axis: otherwise nobody knows how to cut them."
        )
    if not rows:
        raise ValueError("`x`, `y` and `sample_weight` must have rows.")


def check(model, rows: int | None) -> None:
    """Raises a `ValueError` unless there is something to verify."""
    accumulation = getattr(model, "_accumulation", None)
    if accumulation is None or not accumulation.is_active:
        raise ValueError(
            "`model` must accumulate: give it `accum_steps` or "
            "`microbatch_size`, or make it by "
            "`GradientAccumulationModel.from_model`. "
            f"Received: model={model!r}"
        )
    check_rows(model, rows)
    if rows < 3:
        raise ValueError(f"`x` must have at least 3 rows. Received: {rows}")
    if layers := compat.stateful_layers(model):
        raise ValueError(
            "`model` must have no stateful layers: their micro-batches are "
            "steps of a sequence, one after the other, and no parts of a "
            f"batch. Received: {', '.join(layer.name for layer in layers)}"
        )
