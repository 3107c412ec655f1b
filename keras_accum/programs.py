"""Programs for replicas: how their steps are traced and compiled.

XLA cannot compile one program for two devices, so with several replicas each
has programs of its own, inside of `strategy.run`. A single replica has them
around `strategy.run`, as in Keras: what merges replicas, in an optimizer or a
layer, then finds the graph that the replica is in.
"""

import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas


def are_around_run(model: keras.Model) -> bool:
    """Whether a program has `strategy.run` in it, and not the reverse.

    TPUs compile all that `strategy.run` is given.
    """
    strategy = model.distribute_strategy
    return not (replicas.has_several(strategy) or replicas.on_tpu(strategy))


def on_replicas(
    model: keras.Model, step: Callable, inline: bool = True
) -> Callable:
    """Returns what calls a step on each replica, compiled if the model is.

    It is for the host: in cross-replica context.

    Args:
        model: A `GradientAccumulationModel`.
        step: A function of nested tensors.
        inline: As for `traced`, where there is one replica.
    """
    if are_around_run(model):
        run = running(model, step)
        # What is not compiled may as well be a part of what calls it.
        is_part = inline and not model.jit_compile
        return run if is_part else traced(model, run, inline)
    if not model.jit_compile:
        return running(model, step)
    compiled = traced(model, step)
    # Not the `tf.function` itself: it would be put around `strategy.run`.
    return running(model, lambda *args: compiled(*args))


def in_loop(model: keras.Model, step: Callable) -> Callable:
    """Returns a step as a program, for what `with_loop` is given to call."""
    if are_around_run(model):
        step = running(model, step)
    return traced(model, step)


def with_loop(model: keras.Model, loop: Callable) -> Callable:
    """Returns what calls a loop over programs on each replica, for the host.

    Args:
        model: A `GradientAccumulationModel`.
        loop: A function of nested tensors, which calls what `in_loop` returned.
    """
    if are_around_run(model):
        return tf.autograph.experimental.do_not_convert(loop)
    return running(model, loop)


def running(model: keras.Model, function: Callable) -> Callable:
    """Returns what has `strategy.run` call a function."""
    strategy = model.distribute_strategy
    function = tf.autograph.experimental.do_not_convert(function)
    return lambda *args: strategy.run(function, args=args)


def traced(
    model: keras.Model, function: Callable, inline: bool = True
) -> Callable:
    """Returns `function` as a `tf.function`, compiled if the model is.

    If the model runs eagerly, or is compiled for TPUs as a whole, it stays a
    plain function.

    Args:
        model: A `GradientAccumulationModel`.
        function: A function of nested tensors.
        inline: Whether TensorFlow may put its ops in the place of a call. They
            need not wait for what the call waits for.
    """
    function = tf.autograph.experimental.do_not_convert(function)
    if model.run_eagerly or replicas.on_tpu(model.distribute_strategy):
        return function
    return in_graph(
        function,
        jit_compile=model.jit_compile or None,
        reduce_retracing=True,
        experimental_attributes=None if inline else compat.NOT_INLINED,
    )


def in_graph(function: Callable, **options) -> Callable:
    """Returns `function` as a `tf.function`.

    TensorFlow counts the traces of all functions that have the same code, and
    would warn of those of several models as of one that changes all the time.

    Args:
        function: A function of nested tensors.
        **options: Those of `tf.function`.
    """
    # This has no code of its own, and is counted by itself.
    by_itself = functools.partial(function)
    return tf.function(by_itself, autograph=False, **options)
