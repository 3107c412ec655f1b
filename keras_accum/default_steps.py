"""The steps of a model without any of its own: Keras's, without the update."""

import warnings

import keras

from keras_accum import building
from keras_accum import microbatch as microbatches
from keras_accum import step_loss
from keras_accum import steps
from keras_accum.calls import make_call
from keras_accum.step_loss import StepLoss
from keras_accum.steps import forward


def train(accumulation, data) -> dict:
    """Records the gradients of a micro-batch, and what `fit` reports.

    Called by hand, it makes the micro-batch, and adds it to the window.

    Args:
        accumulation: What the model accumulates in.
        data: The micro-batch, which is the current one if there is any.

    Returns:
        The logs.
    """
    model, losses = accumulation.model, accumulation.losses
    if microbatches.current(model) is None:
        with accumulation.microbatch(data) as microbatch:
            logs = train(accumulation, data)
            accumulation.window.add(microbatch)
        return logs
    nonfinite = accumulation.window["nonfinite"]
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with step_loss.tape_for(losses) as tape:
        y_pred = forward(model, x, training=True)
        loss = StepLoss(losses, x, y, y_pred, sample_weight, True, tape)
        weights = model.trainable_weights
        if weights:
            building.build_optimizer_early(
                model.distribute_strategy, model.optimizer, weights
            )
        scaled_loss = model.optimizer.scale_loss(loss.value)
    parts = loss.take_apart(scaled_loss)
    if not weights:
        warnings.warn(
            "The model does not have any trainable weights.", stacklevel=3
        )
    gradients = [part.gradients(tape, weights) for part in parts if weights]
    for each in gradients:
        nonfinite.check(microbatches.current(model), each)
    loss.count(parts)
    logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    # Last, so that a step that fails leaves the window as it was.
    if len(gradients) == 1:
        model.accumulate(gradients[0], parts[0].weight)
    elif gradients:
        for index, part in enumerate(parts):
            call = make_call(model, gradients[index], part.weight)
            steps.accumulate(accumulation, call, place=(index,))
    return logs


def test(accumulation, data) -> dict:
    """Computes what `evaluate` reports of a micro-batch.

    Args:
        accumulation: What the model accumulates in.
        data: The micro-batch, which is the current one.

    Returns:
        The logs.
    """
    model = accumulation.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred = forward(model, x, training=False)
    batch = (x, y, y_pred, sample_weight)
    StepLoss(accumulation.losses, *batch, training=False).count()
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
