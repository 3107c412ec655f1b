"""Random draws."""

import contextlib
import inspect
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.ops import stateless_random_ops

from keras_accum.compat.hooks import Hook

# What draws, and what draws the same numbers from a seed: what Keras uses,
# TensorFlow's dropout, and what users write.
_draws = [
    (Hook(owner, name), stateless)
    for owner, name, stateless in (
        (tf.random, "stateless_uniform", tf.random.stateless_uniform),
        (tf.random, "stateless_normal", tf.random.stateless_normal),
        (
            tf.random,
            "stateless_truncated_normal",
            tf.random.stateless_truncated_normal,
        ),
        (
            stateless_random_ops,
            "stateless_random_uniform",
            tf.random.stateless_uniform,
        ),
        (tf.random, "uniform", tf.random.stateless_uniform),
        (tf.random, "normal", tf.random.stateless_normal),
        (
            tf.random,
            "truncated_normal",
            tf.random.stateless_truncated_normal,
        ),
        (tf.random.Generator, "uniform", tf.random.stateless_uniform),
        (tf.random.Generator, "normal", tf.random.stateless_normal),
        (
            tf.random.Generator,
            "truncated_normal",
            tf.random.stateless_truncated_normal,
        ),
    )
]


@contextlib.contextmanager
def drawing_through(function, in_all_threads: bool) -> Iterator[None]:
    """Passes each draw of random numbers, made eagerly, to `function`.

    What is drawn in a graph stays: the graph may be kept and called again.

    Args:
        function: Called as `function(draw, shape)`, where `draw(shape, seed)`
            draws from two integers. It returns the numbers.
        in_all_threads: Whether draws in other threads are passed as well.
    """

    def drawing(stateless):
        known = inspect.signature(stateless).parameters

        def through(method, *args, **kwargs):
            if not tf.executing_eagerly():
                return method(*args, **kwargs)
            bound = inspect.signature(method).bind(*args, **kwargs).arguments
            shape = bound.pop("shape")
            rest = {
                name: value
                for name, value in bound.items()
                if name in known and name not in ("seed", "name")
            }

            def draw(shape, seed):
                return stateless(shape, seed=seed, **rest)

            return function(draw, shape)

        return through

    with contextlib.ExitStack() as stack:
        for hook, stateless in _draws:
            calling = (
                hook.calling_everywhere if in_all_threads else hook.calling
            )
            stack.enter_context(calling(drawing(stateless)))
        yield
