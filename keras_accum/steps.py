"""One step of training or of evaluation, in one replica, on one micro-batch."""

import contextlib

import keras
import tensorflow as tf

from keras_accum import callers
from keras_accum import compat
from keras_accum import microbatch as microbatches
from keras_accum import rematerialization
from keras_accum import rows
from keras_accum import warned
from keras_accum.calls import Call
from keras_accum.microbatch import Microbatch
from keras_accum.options import check_optimizer


def forward(model: keras.Model, x, training: bool):
    """Calls a model, as Keras's steps do."""
    if compat.takes_training_argument(model):
        return model(x, training=training)
    return model(x)


def train_microbatch(
    accumulation, is_first: bool | tf.Tensor | None, data, **known
) -> dict:
    """Calls the model's `train_step` on a micro-batch of a window.

    Args:
        accumulation: What the model accumulates in.
        is_first: Whether it is the window's first; None if the buffers tell.
        data: The micro-batch.
        **known: What is known of its window: see `Microbatch`.

    Returns:
        The logs.
    """
    microbatch = accumulation.microbatch(data, is_first, **known)
    with microbatch as current:
        logs = call_train_step(accumulation, current, data)
        accumulation.window.add(current)
    return logs


def call_train_step(accumulation, microbatch: Microbatch, data) -> dict:
    """Calls the model's `train_step`, which is to record what it accumulates.

    Args:
        accumulation: What the model accumulates in.
        microbatch: The micro-batch, which is the current one.
        data: Its rows.

    Returns:
        The logs.
    """
    model = accumulation.model

    def refuse(optimizer, variables):
        whose = ""
        if optimizer is not model.optimizer:
            weights = set(map(id, model.weights))
            weights |= {id(weight.value) for weight in model.weights}
            # Of what the model does not have, it accumulates nothing.
            if weights.isdisjoint(map(id, variables)):
                return
            whose = ", optimizer=self.my_optimizer"
        raise RuntimeError(
            "`train_step` must leave the update to the model, since it "
            "accumulates. In place of the optimizer, call `self.accumulate("
            f"zip(gradients, variables), weight{whose})`, with the number of "
            "rows as `weight` if the loss is a mean. "
            f"Received: {callers.line_of_caller()}"
        )

    with contextlib.ExitStack() as stack:
        stack.enter_context(rematerialization.exact())
        stack.enter_context(compat.before_updates(refuse))
        if accumulation.overrides.step("train_step") is not None:
            record = microbatch.origins.record
            stack.enter_context(compat.recording_gradients(record))
        if accumulation.overrides.replaces("train_step"):
            microbatch.rows = rows.common_count(data)
        logs = model.train_step(data)
    if accumulation.overrides.step("train_step") is not None:
        warn_of_assigned(accumulation, microbatch)
    if model.trainable_weights and not microbatch.calls:
        raise RuntimeError(
            "`train_step` returned without a call of `self.accumulate`. "
            "A `train_step` of your own must call "
            "`self.accumulate(zip(gradients, variables), weight)`, where one "
            "that does not accumulate would call "
            "`self.optimizer.apply_gradients`."
        )
    return logs


def warn_of_assigned(accumulation, microbatch: Microbatch) -> None:
    """Warns of what a `train_step` of the user's assigns itself.

    A moving average of the weights, for one, would move once per micro-batch.
    """
    if not microbatch.assigned:
        return
    model, losses = accumulation.model, accumulation.losses
    # Of what layers assign, the first batch tells. Keras's own stateful ones
    # are to go on from each micro-batch to the next.
    known = {*losses.found.repeated, *losses.found.driven}
    sequential = {
        id(state)
        for layer in compat.stateful_layers(model)
        for state in layer.non_trainable_variables
    }
    paths = [
        variable.path
        for index, variable in compat.inner_state(model).items()
        if id(variable) in microbatch.assigned.keys() - sequential
        and index not in known
    ]
    if paths:
        losses.warn_once(warned.assigned(paths))


def accumulate(accumulation, call: Call, place: tuple | None = None) -> None:
    """Records a call of `accumulate` in its micro-batch, or makes it one.

    Args:
        accumulation: What the model accumulates in.
        call: The call.
        place: What tells losses apart; None for its place in the code.
    """
    check_optimizer(call.optimizer)
    window = accumulation.window
    microbatch = microbatches.current(accumulation.model)
    if microbatch is None:
        # By hand, outside of any step: nobody says where one begins and ends.
        microbatch = accumulation.new_microbatch()
        window["nonfinite"].check(microbatch, call.gradients)
        microbatch.record(call, place=())
        window.add(microbatch)
        return
    check_is_in_step(microbatch)
    if call.weight is not None and microbatch.origins.is_of_vector(
        call.gradients
    ):
        accumulation.losses.warn_once(
            "`accumulate` was given gradients of a loss with several values, "
            "and a `weight`. A tape adds the values up, and a weight is the "
            "denominator of a mean: take the mean before the gradient, as with "
            "`tf.reduce_mean`, or give `weight=None` if the loss is a sum."
        )
    window["nonfinite"].check(microbatch, call.gradients)
    if place is None:
        place = callers.path_from(call_train_step)
    microbatch.record(call, place)


def check_is_in_step(microbatch: Microbatch) -> None:
    """Raises a `RuntimeError` where TensorFlow decides how often code runs."""
    if compat.current_graph() is not microbatch.graph:
        raise RuntimeError(
            "`accumulate` must be called by `train_step` itself, and not in a "
            "`tf.function`, a `tf.cond` or a loop of TensorFlow, which run as "
            "often as TensorFlow decides. Leave out a decorator "
            "`@tf.function`, since `fit` compiles the step; or return the "
            "gradients, zeros where there are none, and call `accumulate` "
            f"after it. Received: {callers.line_of_caller()}"
        )


def test_microbatch(
    accumulation, is_first: bool | tf.Tensor, data, **known
) -> dict:
    """Calls the model's `test_step` on a micro-batch of a batch.

    It leaves all as it was if there are no rows.

    Args:
        accumulation: What the model accumulates in.
        is_first: Whether it is the batch's first, or the whole.
        data: The micro-batch.
        **known: What is known of its window: see `Microbatch`.

    Returns:
        The logs.
    """
    model = accumulation.model
    function = model.test_function
    microbatch = accumulation.microbatch(data, is_first, trains=False, **known)
    with microbatch as current, rematerialization.exact():
        logs = model.test_step(data)
        # What an evaluation assigns is made the replicas' mean as well.
        accumulation.window["state"].add(current)
    # Replacing a metric asks for another function, and it is just made.
    model.test_function = function
    return logs
