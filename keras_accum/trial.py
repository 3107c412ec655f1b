"""A forward pass on some rows of a batch, which changes nothing.

Passes on the whole and on a part of it are made alike in all that is no
property of a row: all rows have the same random draws, and BatchNormalization
has the same moments in both.
"""

import contextlib
import dataclasses
import random
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import rows as row_counts
from keras_accum.steps import forward

# Of all draws.
SEED = (0, 0)
# Methods of variables that Keras does not know of.
ASSIGNMENTS = (
    "assign",
    "assign_add",
    "assign_sub",
    "scatter_add",
    "scatter_sub",
    "scatter_update",
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a forward pass in training gave.

    Attributes:
        y_pred: The outputs.
        added: What layers added by `add_loss` and activity regularizers.
        added_by: The names of these layers.
        assigned: Values of variables that were assigned, by `id`.
        moments: What each call of a BatchNormalization normalized by.
    """

    y_pred: object
    added: list[tf.Tensor]
    added_by: list[str]
    assigned: dict[int, tf.Tensor]
    moments: list[tuple]


def of_whole(model: keras.Model, x) -> Trial:
    """Calls a model on some rows.

    Args:
        model: The model, built.
        x: Inputs.
    """
    moments = []

    def record(compute, *args):
        moments.append(compute(*args))
        return moments[-1]

    with compat.replacing_moments(record):
        return called(model, x, moments)


def of_part(model, x, start: int, stop: int, whole: Trial, state=()) -> Trial:
    """Calls a model on rows that `of_whole` has called it on, among others.

    Args:
        model: The model.
        x: All of the inputs.
        start: The first row.
        stop: The row after the last.
        whole: What `of_whole` returned.
        state: Pairs of variables and values to begin with.
    """
    moments = iter(whole.moments)
    with compat.replacing_moments(lambda compute, *args: next(moments)):
        return called(model, row_counts.take(x, start, stop), [], state)


def called(model, x, moments, state=()) -> Trial:
    """Calls a model, and returns what came of it.

    Args:
        model: The model.
        x: Inputs.
        moments: What to return as `Trial.moments`.
        state: Pairs of variables and values to begin with.
    """
    variables = [*model.variables, *compat.existing_seed_state()]
    with (
        keras.StatelessScope(list(state), collect_losses=True) as scope,
        drawing_alike(),
        compat.replacing_assignments(dict.fromkeys(ASSIGNMENTS, unassigned)),
    ):
        y_pred = forward(model, x, training=True)
        added = compat.added_by(model)
    values = {id(v): scope.get_current_value(v) for v in variables}
    assigned = {
        key: value for key, value in values.items() if value is not None
    }
    return Trial(
        y_pred,
        [loss for _, loss in added],
        [name for name, _ in added],
        assigned,
        moments,
    )


def unassigned(variable, value):
    """Assigns nothing."""
    del value
    return variable


@contextlib.contextmanager
def keeping_random_states() -> Iterator[None]:
    """Puts back the states of Python's and NumPy's random generators."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextlib.contextmanager
def drawing_alike(in_all_threads: bool = False) -> Iterator[None]:
    """Draws the same for each row, whatever rows are with it.

    What is drawn along the first axis, which is that of rows, is the same.

    Args:
        in_all_threads: Whether in other threads too, such as replicas'.
    """

    def draw_alike(draw, shape):
        shape = tf.convert_to_tensor(shape, tf.int32)
        if tf.size(shape) == 0:
            return draw(shape, SEED)
        row = draw(tf.concat([[1], shape[1:]], axis=0), SEED)
        return tf.broadcast_to(row, shape)

    with compat.drawing_through(draw_alike, in_all_threads):
        yield
