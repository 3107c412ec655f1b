"""Programs for one replica: how its steps are traced and compiled."""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum import replicas


def compile_for_replica(model: keras.Model, function: Callable) -> Callable:
    """Returns `function` for `strategy.run`, compiled if the model is.

    `strategy.run` would lift a `tf.function` around the whole of itself, and
    XLA cannot compile one program for two devices; it leaves a plain function
    around one alone. TPUs compile all that `strategy.run` is given.
    """
    if not model.jit_compile:
        return tf.autograph.experimental.do_not_convert(function)
    compiled = trace_for_replica(model, function)
    return lambda *args: compiled(*args)


def trace_for_replica(
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
    return tf.function(
        function,
        autograph=False,
        jit_compile=model.jit_compile or None,
        reduce_retracing=True,
        experimental_attributes=None if inline else {"_noinline": True},
    )
