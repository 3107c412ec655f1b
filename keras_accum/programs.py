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

from keras_accum import replicas
from keras_accum.control_flow import tensors_in


def are_around_run(model: keras.Model) -> bool:
    """Returns whether programs are around `strategy.run`, and not inside it.

    TPUs compile all that `strategy.run` is given.
    """
    strategy = model.distribute_strategy
    return not (replicas.has_several(strategy) or replicas.on_tpu(strategy))


def on_replicas(model: keras.Model, step: Callable) -> Callable:
    """Returns a function that calls a step on each replica.

    It is compiled if the model is. It is for the host: in cross-replica
    context. As `strategy.run`, it takes the step's arguments as a tuple,
    `args`.

    Args:
        model: A `GradientAccumulationModel`.
        step: A function of nested tensors.
    """
    run = model.distribute_strategy.run
    step = tf.autograph.experimental.do_not_convert(step)
    if are_around_run(model):
        return traced(model, functools.partial(run, step))
    if not model.jit_compile:
        return functools.partial(run, step)
    compiled = traced(model, step)
    # Not the `tf.function` itself: it would be put around `strategy.run`.
    return functools.partial(run, lambda *args: compiled(*args))


def on_first_replica(model: keras.Model, step: Callable) -> Callable:
    """Returns what `on_replicas` does, for the first replica's result alone."""
    return merging(model, step, first_replica)


def merging(model: keras.Model, step: Callable, merge: Callable) -> Callable:
    """Returns what `on_replicas` does, with the replicas' results merged.

    Args:
        model: A `GradientAccumulationModel`.
        step: A function of nested tensors.
        merge: `first_replica` or `mean_of_replicas`.
    """
    run = on_replicas(model, step)
    strategy = model.distribute_strategy
    if not replicas.has_several(strategy):
        return run
    return lambda args: merge(strategy, run(args=args))


def first_replica(strategy: tf.distribute.Strategy, values):
    """Returns what the first of this worker's replicas returned.

    It depends on what all of them did, so that a step that fails on one fails.
    """
    done = []

    def first(value):
        local_values = strategy.experimental_local_results(value)
        done.extend(tensors_in(local_values))
        return local_values[0]

    firsts = keras.tree.map_structure(first, values)
    with tf.control_dependencies(done):
        return keras.tree.map_structure(tf.identity, firsts)


def mean_of_replicas(strategy: tf.distribute.Strategy, values):
    """Returns the mean of what this worker's replicas returned, as Keras does.

    On TPUs Keras takes the first replica's.
    """
    if replicas.on_tpu(strategy):
        return first_replica(strategy, values)
    return keras.tree.map_structure(
        lambda value: tf.reduce_mean(
            tf.stack(strategy.experimental_local_results(value)), axis=0
        ),
        values,
    )


def in_loop(model: keras.Model, step: Callable) -> Callable:
    """Returns a step as a program, for loops that `with_loop` is given."""
    if are_around_run(model):
        step = running(model, step)
    return traced(model, step)


def with_loop(model: keras.Model, loop: Callable) -> Callable:
    """Returns a function, for the host, that calls a loop on each replica.

    Args:
        model: A `GradientAccumulationModel`.
        loop: A function of nested tensors, which calls what `in_loop` returned.
    """
    if are_around_run(model):
        return tf.autograph.experimental.do_not_convert(loop)
    return running(model, loop)


def running(model: keras.Model, function: Callable) -> Callable:
    """Returns a function that calls another one by `strategy.run`."""
    strategy = model.distribute_strategy
    function = tf.autograph.experimental.do_not_convert(function)
    return lambda *args: strategy.run(function, args=args)


def traced(model: keras.Model, function: Callable) -> Callable:
    """Returns `function` as a `tf.function`, compiled if the model is.

    If the model runs eagerly, or is compiled for TPUs as a whole, it stays a
    plain function.

    Args:
        model: A `GradientAccumulationModel`.
        function: A function of nested tensors.
    """
    function = tf.autograph.experimental.do_not_convert(function)
    if model.run_eagerly or replicas.on_tpu(model.distribute_strategy):
        return function
    return in_graph(
        function, jit_compile=model.jit_compile or None, reduce_retracing=True
    )


def in_graph(function: Callable, **options) -> Callable:
    """Returns `function` as a `tf.function`.

    TensorFlow counts together the traces of all functions that have the same
    code. For several models it would warn as for one that changes all the time.

    Args:
        function: A function of nested tensors.
        **options: Options of `tf.function`.
    """
    # This has no code of its own, and is counted by itself.
    by_itself = functools.partial(function)
    return tf.function(by_itself, autograph=False, **options)
