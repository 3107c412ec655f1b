"""Gradient tapes, and what they are asked for."""

import tensorflow as tf

from keras_accum.compat.hooks import Hook

_gradient = Hook(tf.GradientTape, "gradient")


def recording_gradients(function):
    """Calls `function` after each gradient of a tape, in this thread.

    Args:
        function: Called as `function(target, sources, gradients)`; None to
            call nobody.

    Returns:
        A context manager.
    """

    def gradient(method, tape, target, sources, *args, **kwargs):
        gradients = method(tape, target, sources, *args, **kwargs)
        function(target, sources, gradients)
        return gradients

    return _gradient.calling(None if function is None else gradient)
