"""What steps of a model assign, and eager steps after which all is put back."""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import discovery
from keras_accum import replicas


def variables_of(
    model: keras.Model, own: Sequence[tf.Variable] | None = None
) -> list[tf.Variable]:
    """Returns what steps assign, or may: all but what accumulation makes.

    Layers may assign weights that are trained as well, as
    `SpectralNormalization` does.

    Args:
        model: The model, built.
        own: What `own_variables` returned, if it was asked before.
    """
    known = (
        *model.variables,
        *model.metrics_variables,
        *compat.existing_seed_state(),
    )
    own = own_variables(model) if own is None else own
    found = [*(each.value for each in known), *own]
    return list({id(each): each for each in found}.values())


def own_variables(model: keras.Model) -> list[tf.Variable]:
    """Returns variables of a model and its layers that Keras does not know of.

    These are attributes, or in a list or dict that is one: a `tf.Variable`, or
    those of a `tf.Module` or a `tf.random.Generator`.
    """
    kinds = tf.Variable, tf.Module, tf.random.Generator
    return [
        found
        for layer in (model, *compat.all_layers(model))
        for value in discovery.attributes(layer)
        if isinstance(value, kinds)
        for found in tf.train.TrackableView(value).descendants()
        if isinstance(found, tf.Variable)
    ]


def check_built(accumulation) -> None:
    """Raises a `ValueError` if a step would make weights."""
    model = accumulation.model
    if model.built:
        return
    unbuilt = [model]
    if accumulation.overrides.step("train_step") is not None:
        # Such a step may call the parts of a model, and never the model.
        unbuilt = [
            each for each in compat.unbuilt_layers(model) if each is not model
        ]
    if unbuilt:
        raise ValueError(
            "`model` must be built. Call it on some rows first. Received: "
            f"{', '.join(each.name for each in unbuilt)} not built"
        )


@contextlib.contextmanager
def unchanged(model) -> Iterator[None]:
    """Puts back all that steps change of a model."""
    accumulation, tracker = model._accumulation, compat.loss_tracker(model)
    strategy = model.distribute_strategy
    check_built(accumulation)
    variables = variables_of(model)
    variables += [each.value for each in model.optimizer.variables]
    trackers = accumulation.window["losses"].trackers
    variables += [each for tracker in trackers for each in tracker.windows]
    snapshot = replicas.Snapshot(strategy, variables)
    functions = (
        model.train_function,
        model.test_function,
        model.predict_function,
    )
    try:
        with compat.running_eagerly(model):
            yield
    finally:
        compat.set_loss_tracker(model, tracker)
        (
            model.train_function,
            model.test_function,
            model.predict_function,
        ) = functions
        snapshot.restore()
