"""What TensorBoard's callback is shown of a model."""

import keras
from keras.src.models.functional import Functional

from keras_accum.compat.hooks import Hook
from keras_accum.compat.hooks import attribute

_summary = Hook(keras.callbacks.TensorBoard, "_write_keras_model_summary")


def showing_graph(seen_as):
    """Shows TensorBoard's callback the layers of a model of a derived class.

    Keras goes by the name of the class, and shows those of two classes alone.

    Args:
        seen_as: Called as `seen_as(model, cls)`: returns the model as one of
            its base classes.

    Returns:
        A context manager, for this thread.
    """

    def write(method, callback):
        for cls in (keras.Sequential, Functional):
            if isinstance(callback.model, cls):
                view = seen_as(callback.model, cls)
                with attribute(callback, "_model", view):
                    return method(callback)
        return method(callback)

    return _summary.calling(write)
