"""Which of a model's methods are a user's own."""

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
