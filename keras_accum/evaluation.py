"""The functions that `evaluate` and `predict` call for every step."""

import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import each_microbatch
from keras_accum import first_batch
from keras_accum import loops
from keras_accum import microbatching
from keras_accum import programs
from keras_accum import steps
from keras_accum.control_flow import after
from keras_accum.microbatch_size import check_layers


def make_test_function(accumulation) -> Callable:
    """Returns a test function for several replicas, or for micro-batches.

    For several replicas Keras compiles around `strategy.run`, which XLA refuses
    where there are several devices, and reduces all logs at every step. And it
    takes each batch as a whole.
    """
    model, size = accumulation.model, accumulation.size.rows
    if size is not None:
        check_layers(model)
    test = functools.partial(steps.test_microbatch, accumulation)
    if size is None:
        run = programs.merging(
            model, functools.partial(test, True), programs.mean_of_replicas
        )

        def step(data):
            return run(args=(data,))
    else:
        each = each_microbatch.EachMicrobatch(accumulation, test, False)

        def end_window():
            for tracker in accumulation.window["losses"].trackers:
                tracker.close()

        def step(data):
            logs = each((data,), size)
            with after(logs):
                programs.running(model, end_window)()
            return logs

    loop = loops.make_loop(model, step, model.steps_per_execution)
    if size is None:
        return loop
    losses = accumulation.losses

    compiled = step
    if not model.run_eagerly:
        compiled = programs.in_graph(step, reduce_retracing=True)
    look = functools.partial(first_batch.look_at, accumulation)
    first_loop = loops.make_looking_loop(model, loop, compiled, look)

    def test_function(iterator):
        is_first = losses.are_to_be_measured()
        return (first_loop if is_first else loop)(iterator)

    return test_function


def make_predict_function(accumulation) -> Callable:
    """Returns a predict function, for the same cases."""
    model, size = accumulation.model, accumulation.size.rows
    if size is not None:
        check_layers(model)
    predict = microbatching.concatenating(model, model.predict_step, size)

    def step(data):
        outputs = predict(data)
        return compat.concatenate_outputs(outputs, model.distribute_strategy)

    step = compat.optionals_to_none(model, step)
    if not model.run_eagerly:
        step = programs.in_graph(step, reduce_retracing=True)

    def predict_function(batches):
        outputs = [step(batch) for batch in batches]
        return keras.tree.map_structure(
            lambda *leaves: tf.concat(leaves, axis=0), *outputs
        )

    return predict_function
