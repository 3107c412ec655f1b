"""Which of a model's methods are a user's own."""

import inspect
from collections.abc import Callable

import keras

from keras_accum import compat


def is_custom(
    model: keras.Model, ours: type, name: str, in_front: bool = False
) -> bool:
    """Returns whether a method of a model is not ours, nor Keras's.

    Args:
        model: The model.
        ours: The mixin.
        name: "train_step" or "test_step"; or a method that Keras has not.
        in_front: Whether to look in front of the mixin too, and not only at
            the steps of the class behind it.
    """
    is_replaced = getattr(type(model), name) is not getattr(ours, name)
    if not name.endswith(("train_step", "test_step")):
        return is_replaced
    if in_front and is_replaced:
        return True
    return compat.has_custom_step(model, ours, name)


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
    # What `exec` makes may have no module.
    return (step.__module__ or "").startswith(__package__ + ".")
