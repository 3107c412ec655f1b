"""The optimizers that a step of one's own uses, found before it counts.

Without its variables a `LossScaleOptimizer` scales by a constant, and what is
traced then goes on to do so after the scale has changed. And a schedule of
`accum_steps` goes by the updates of an optimizer that only the step names. So
the step is traced once more, before all else, and what was traced is thrown
away. Keras traces a step that makes variables twice, too.
"""

from collections.abc import Iterator

import keras
import tensorflow as tf

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

    def step(data):
        with accumulation.microbatch(data, is_first=True) as microbatch:
            steps.call_train_step(accumulation, microbatch, data)
            accumulation.window["gradients"].find(microbatch)

    specs = tf.nest.map_structure(spec_of, data)
    traced = programs.in_graph(programs.running(accumulation.model, step))
    replicas.outside_of_tracing(lambda: traced.get_concrete_function(specs))


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
