"""The end of a window: a sum over the replicas, and the update.

Between boundaries nothing crosses replicas. At a boundary all that the window
gathered is added up over them, at once; then each makes the same update, and
the metrics' results are those of all.
"""

import contextlib
import contextvars
from collections.abc import Callable
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import programs
from keras_accum import reduction
from keras_accum import replicas
from keras_accum.window import Window

# The window, and what its `sums` of all replicas add up to. A user's
# `update_step` may stand between who sets it and who reads it.
_TOTALS = contextvars.ContextVar("keras_accum_totals", default=(None, None))


def end_window(
    model: keras.Model, window: Window, vector: tf.Tensor | None = None
) -> dict | None:
    """Ends the window in the train function, within each replica.

    Args:
        model: The model.
        window: Its window.
        vector: What `reduction.sum_in_place` returned, or None if the replicas'
            sums are still to be added up.

    Returns:
        The logs of all replicas, or None if there is only one replica.
    """
    if not replicas.has_several(model.distribute_strategy):
        model.update_step()
        return None
    if vector is None:
        totals = sums_of_all(window)
    else:
        totals = reduction.taken_apart(
            vector, window.sums(), window["gradients"].summed
        )
    # If there was no batch, nothing may change: not the number of updates
    # either, which does not depend on the sums by itself.
    with tf.control_dependencies(tf.nest.flatten(totals)[:1]):
        token = _TOTALS.set((window, totals))
        try:
            model.update_step()
        finally:
            _TOTALS.reset(token)
        return logs_of_all(model, window, totals)


def update(model: keras.Model, window: Window) -> None:
    """Updates by the window's mean gradient, and starts a new window.

    Args:
        model: The model.
        window: Its window.
    """
    totals_window, totals = _TOTALS.get()
    if totals_window is not window:
        totals = sums_of_all(window)
    nonfinite, applies = window["nonfinite"], None
    if model.trainable_weights:
        # All of them before the first one moves a weight.
        updates = window["gradients"].updates(totals["gradients"])
        applies = nonfinite.applies(totals["nonfinite"], totals["gradients"])
        window["told"].measure(totals, updates, applies)
        for each in updates:
            is_only = len(updates) == 1
            with (
                updating_local_copies(model, each.optimizer),
                nonfinite.updating_if(
                    applies, totals["nonfinite"], each, is_only
                ),
            ):
                each.apply()
    window.close(totals, applies)


def sums_of_all(window: Window) -> dict[str, list[tf.Tensor]]:
    """Returns what the window's `sums` of all replicas add up to."""
    sums = window.sums()
    destination = window["gradients"].accumulator.weight
    dtype = window["gradients"].options.communication_dtype
    if dtype is None:
        return reduction.sum_over_replicas(sums, destination)
    buffers = window["gradients"].summed
    return reduction.put_together(
        sums,
        buffers,
        reduction.sum_over_replicas(buffers, destination, dtype),
        reduction.sum_over_replicas(
            reduction.without(sums, buffers), destination
        ),
    )


def sum_in_place(strategy: tf.distribute.Strategy, window: Window):
    """Adds up the window over all replicas, in cross-replica context.

    The buffers that held a replica's sums then hold those of all: the next
    window starts them anew.

    Returns:
        What `end_window` needs of the rest, for each replica.
    """
    buffers = window["gradients"].summed
    return reduction.sum_in_place(
        strategy,
        buffers,
        lambda: reduction.without(window.sums(), buffers),
        window["gradients"].accumulator.weight,
        window["gradients"].options.communication_dtype,
    )


@contextlib.contextmanager
def updating_local_copies(
    model: keras.Model, optimizer: keras.Optimizer
) -> Iterator[None]:
    """Makes an optimizer update a replica's copies, and ask no other."""
    strategy = model.distribute_strategy
    if not replicas.has_copies(strategy):
        yield
        return
    on_tpu = replicas.on_tpu(strategy)
    with compat.without_communication(optimizer, on_tpu):
        yield


def logs_of_all(model: keras.Model, window: Window, totals) -> dict:
    """Returns the metrics' results, from what the replicas' sums add up to."""
    variables = window["metrics"].keras_variables
    values = dict(zip(map(id, variables), totals["metrics"], strict=True))
    window["losses"].add_to(values, totals["losses"])
    mapping = [(variable, values[id(variable)]) for variable in variables]
    with keras.StatelessScope(state_mapping=mapping):
        return model.get_metrics_result()


def merge_logs(logs, reduced):
    """Replaces the first replica's values in `logs` by those of all replicas.

    Args:
        logs: What a step returned.
        reduced: What `end_window` returned.
    """
    if not isinstance(logs, dict) or not isinstance(reduced, dict):
        return logs
    return {
        name: tf.cast(reduced.get(name, value), tf.as_dtype(value.dtype))
        if isinstance(value, tf.Tensor)
        else value
        for name, value in logs.items()
    }


def make_update(accumulation) -> Callable:
    """Returns a function that updates on all replicas and starts a new window.

    Returns:
        A function without arguments, for the host: in cross-replica context.
        It returns the logs, a dict, if there are several replicas.
    """
    model, window = accumulation.model, accumulation.window
    strategy = model.distribute_strategy
    is_replicated = replicas.has_several(strategy)
    # Made by the first trace, they would ask for a second one.
    window.make_variables()
    # XLA knows reductions on TPUs alone; else they come between two programs.
    splits = is_replicated and not replicas.on_tpu(strategy)
    # A program knows the variables that there were when it was traced.
    end = programs.on_first_replica(
        model,
        lambda signature, vector=None: end_window(model, window, vector),
    )

    def update(signature):
        args = (signature,)
        if splits:
            # Not compiled: where TensorFlow copies one tensor after the other,
            # XLA on a CPU looks up for each number where it comes from.
            args += (sum_in_place(strategy, window),)
        logs = end(args=args)
        accumulation.position.complete()
        return logs

    # Keras wants a function of its own to make the optimizer's variables in.
    # With reductions it must not be one, since it is called in a `tf.cond`, and
    # TensorFlow numbers the reductions of a function where it is called.
    if not model.run_eagerly and not is_replicated:
        update = programs.in_graph(update)
    return lambda: update(window.signature())


def make_update_for_host(accumulation) -> Callable:
    """Returns a function as `make_update`, which the host calls by itself."""
    update, window = make_update(accumulation), accumulation.window
    if accumulation.model.run_eagerly:
        return update
    traced = programs.in_graph(lambda signature: update())
    return lambda: traced(window.signature())


def planned_bytes(model: keras.Model) -> int:
    """Returns the bytes that a compiled update takes.

    It is 0 on several replicas: XLA plans no sums over these.
    """
    if replicas.has_several(model.distribute_strategy):
        return 0
    return compat.planned_bytes(
        programs.in_graph(
            programs.running(model, model.update_step), jit_compile=True
        )
    )
