"""A forward pass on some rows of a batch, which changes nothing.

Passes on the whole and on a part of it are made alike in all that is no
property of a row: all rows have the same random draws, and BatchNormalization
has the same moments in both.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import rows as row_counts
from keras_accum.steps import forward

# Of all draws.
SEED = (0, 0)


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
        model: The model. Its variables are made if they are not there.
        x: Inputs.
    """
    if not model.built:
        forward(model, x, training=False)
    moments = []

    def record(compute, *args):
        moments.append(compute(*args))
        return moments[-1]

    with compat.replacing_moments(record):
        return called(model, x, moments)


def of_part(model, x, start: int, stop: int, whole: Trial) -> Trial:
    """Calls a model on rows that `of_whole` has called it on, among others.

    Args:
        model: The model.
        x: All of the inputs.
        start: The first row.
        stop: The row after the last.
        whole: What `of_whole` returned.
    """
    moments = iter(whole.moments)
    with compat.replacing_moments(lambda compute, *args: next(moments)):
        return called(model, row_counts.take(x, start, stop), [])


def called(model, x, moments) -> Trial:
    """Calls a model, and returns what came of it."""
    variables = [*model.variables, *compat.existing_seed_state()]
    with (
        keras.StatelessScope(collect_losses=True) as scope,
        drawing_alike(),
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


@contextlib.contextmanager
def drawing_alike() -> Iterator[None]:
    """Draws the same for each row, whatever rows are with it.

    What is drawn along the first axis, which is that of rows, is the same.
    """

    def draw_alike(draw, shape):
        shape = tf.convert_to_tensor(shape, tf.int32)
        if tf.size(shape) == 0:
            return draw(shape, SEED)
        row = draw(tf.concat([[1], shape[1:]], axis=0), SEED)
        return tf.broadcast_to(row, shape)

    with compat.drawing_through(draw_alike):
        yield
