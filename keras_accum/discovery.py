"""What a step needs, made or found before the step counts.

Data of any form may be given to a step of one's own, and only tracing it tells
which variables it makes, and whose updates it is for. So it is traced once
more, before all else, and what was traced is thrown away. Keras traces a step
that makes variables twice, too.

Without its variables a `LossScaleOptimizer` scales by a constant, and what is
traced then goes on to do so after the scale has changed. And a schedule of
`accum_steps` goes by the updates of an optimizer that only the step names.
"""

from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import building
from keras_accum import compat
from keras_accum import objectives
from keras_accum import programs
from keras_accum import replicas
from keras_accum import steps


def find_optimizers(accumulation, data) -> None:
    """Finds the optimizers of a step, and makes the variables of all.

    It does nothing where nothing depends on them, and where nothing is traced.

    Args:
        accumulation: What the model accumulates in.
        data: A batch, in cross-replica context.
    """
    if not tf.inside_function() or not is_needed(accumulation):
        return
    trace_step(accumulation, data)


def trace_step(accumulation, data) -> None:
    """Traces a step, which makes its variables, and runs nothing.

    Args:
        accumulation: What the model accumulates in.
        data: A batch, in cross-replica context.
    """
    model, strategy = accumulation.model, accumulation.model.distribute_strategy

    def step(data):
        with accumulation.microbatch(data, is_first=True) as microbatch:
            steps.call_train_step(accumulation, microbatch, data)
            objectives.build_optimizers(microbatch.calls, strategy)
            accumulation.window["gradients"].find(microbatch)

    def trace(data):
        specs = tf.nest.map_structure(spec_of, data)
        traced = programs.in_graph(programs.running(model, step))
        replicas.outside_of_tracing(lambda: traced.get_concrete_function(specs))

    compat.optionals_to_none(model, trace)(data)


def build_for(accumulation, data) -> None:
    """Makes all variables that a training batch needs, without running it.

    Args:
        accumulation: What the model accumulates in.
        data: The batch, in cross-replica context.
    """
    model, window_losses = accumulation.model, accumulation.window["losses"]
    strategy = model.distribute_strategy
    if accumulation.overrides.step("train_step") is None:
        local = replicas.first_local(strategy, data)
        with strategy.scope():
            if model.built:
                weights = model.trainable_weights
                building.build_optimizer(model.optimizer, weights)
            compat.symbolic_build(model, local)
    elif not model.run_eagerly:
        # What its data are, it knows alone.
        trace_step(accumulation, data)
    compiled = compat.compiled_loss(model)
    if compiled is not None and compat.output_metrics(compiled):
        window_losses.make_output_trackers()
    window_losses.resume()


def build_for_resumed(accumulation, data) -> None:
    """Makes the variables of metrics, for a window from a checkpoint.

    Keras makes them while it traces. The checkpoint may have the sums of
    metrics of single outputs.

    Args:
        accumulation: What the model accumulates in.
        data: The batch, in cross-replica context.
    """

    def build():
        if accumulation.position.read()[0]:
            build_for(accumulation, data)

    if accumulation.window["losses"].is_restored:
        replicas.outside_of_tracing(build)


def is_needed(accumulation) -> bool:
    """Returns whether a step's optimizers must be known before it is traced."""
    model = accumulation.model
    if accumulation.overrides.step("train_step") is None:
        return False
    if accumulation.window["gradients"].has_optimizers:
        return False
    return accumulation.options.window_kind == "schedule" or any(
        isinstance(value, keras.optimizers.LossScaleOptimizer)
        and not value.built
        for value in attributes(model)
    )


def attributes(model: keras.Model) -> Iterator:
    """Yields what a model's attributes are, and what is in lists and dicts."""
    for value in vars(model).values():
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def spec_of(value):
    """Returns what a program has to know of a part of a batch."""
    return None if value is None else tf.type_spec_from_value(value)
