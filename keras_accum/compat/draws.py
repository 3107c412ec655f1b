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
    )
]


@contextlib.contextmanager
def drawing_through(function) -> Iterator[None]:
    """Passes each draw of random numbers, in any thread, to `function`.

    Args:
        function: Called as `function(draw, shape)`, where `draw(shape, seed)`
            draws from two integers. It returns the numbers.
    """

    def drawing(stateless):
        known = inspect.signature(stateless).parameters

        def through(method, *args, **kwargs):
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
            stack.enter_context(hook.calling_everywhere(drawing(stateless)))
        yield
