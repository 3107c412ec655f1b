"""Random draws."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.ops import stateless_random_ops

from keras_accum.compat.hooks import Hook

# What Keras draws by, and TensorFlow's dropout.
_draws = [
    Hook(tf.random, "stateless_uniform"),
    Hook(tf.random, "stateless_normal"),
    Hook(tf.random, "stateless_truncated_normal"),
    Hook(stateless_random_ops, "stateless_random_uniform"),
]


@contextlib.contextmanager
def drawing_through(function) -> Iterator[None]:
    """Passes each draw of random numbers, in this thread, to `function`.

    Args:
        function: Called as `function(draw, shape)`, where `draw(shape)` draws.
            It returns the numbers.
    """

    def drawing(method, *args, **kwargs):
        if "shape" in kwargs:
            shape = kwargs.pop("shape")
        else:
            shape, *args = args
        return function(lambda shape: method(shape, *args, **kwargs), shape)

    with contextlib.ExitStack() as stack:
        for hook in _draws:
            stack.enter_context(hook.calling(drawing))
        yield
