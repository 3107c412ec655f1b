"""One step of training or of evaluation, in one replica, on one micro-batch."""

import inspect
from collections.abc import Callable

import keras

from keras_accum import callers
from keras_accum import compat


def forward(model: keras.Model, x, training: bool):
    """Calls a model, as Keras's steps do."""
    if compat.takes_training_argument(model):
        return model(x, training=training)
    return model(x)


def is_own(step: Callable) -> bool:
    """Returns whether a step is a user's that does not call ours.

    Args:
        step: A `train_step`, as a class has it.
    """
    if is_default(step):
        return False
    code = getattr(inspect.unwrap(step), "__code__", None)
    # What calls `super()` has its class at hand.
    return code is None or "__class__" not in code.co_freevars


def is_default(step: Callable) -> bool:
    """Returns whether a step is ours: a class has not overridden it."""
    return step.__module__.startswith(__package__ + ".")


def train_microbatch(accumulation, is_first: bool, data, **known) -> dict:
    """Calls the model's `train_step` on a micro-batch of a window.

    Args:
        accumulation: What the model accumulates in.
        is_first: Whether it is the window's first.
        data: The micro-batch.
        **known: What is known of its window: see `Microbatch`.

    Returns:
        The logs.
    """
    model = accumulation.model

    def refuse(optimizer):
        if optimizer is model.optimizer:
            raise RuntimeError(
                "`train_step` must leave the update to the model, since it "
                "accumulates. Call `self.accumulate(gradients, weight)` in "
                "place of the optimizer, with the number of rows as `weight` "
                f"if the loss is a mean. Received: {callers.line_of_caller()}"
            )

    with (
        accumulation.microbatch(data, is_first, **known) as microbatch,
        compat.before_updates(refuse),
    ):
        logs = model.train_step(data)
        if model.trainable_weights and not microbatch.accumulated:
            raise RuntimeError(
                "`train_step` returned without a call of `self.accumulate`. "
                "A `train_step` of your own must call "
                "`self.accumulate(gradients, weight)`, where one that does not "
                "accumulate would call `self.optimizer.apply_gradients`."
            )
    return logs


def test_microbatch(accumulation, is_first: bool, data, **known) -> dict:
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
    with accumulation.microbatch(data, is_first, trains=False, **known):
        logs = model.test_step(data)
    # Replacing a metric asks for another function, and it is just made.
    model.test_function = function
    return logs
