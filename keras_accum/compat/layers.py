"""The layers of a model: random generators and BatchNormalization."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random import seed_generator

from keras_accum.compat.hooks import Hook
from keras_accum.compat.hooks import attribute

_calls = Hook(keras.Operation, "__call__")
_moments = Hook(keras.layers.BatchNormalization, "_moments")


def random_states(model) -> list[keras.Variable]:
    """Returns the states of all random generators of a model's layers."""
    return [
        generator.state
        for layer in model._flatten_layers()
        for generator in layer._seed_generators
    ]


def inner_state(model) -> dict[int, keras.Variable]:
    """Returns the variables of a model that layers of one's own may assign.

    By their index in `model.variables`. Those of random generators, metrics and
    BatchNormalization, which Keras takes care of, are not among them.
    """
    others = [*random_states(model), *model.metrics_variables]
    for layer in normalizations(model):
        others += moving_statistics(layer)
    others = set(map(id, others))
    return {
        index: variable
        for index, variable in enumerate(model.variables)
        if id(variable) not in others
    }


def all_layers(model) -> list[keras.layers.Layer]:
    """Returns the layers of a model, and those in them, without itself."""
    return list(model._flatten_layers(include_self=False))


def unbuilt_layers(model) -> list[keras.layers.Layer]:
    """Returns the layers of a model, itself among them, that are not built."""
    return [layer for layer in model._flatten_layers() if not layer.built]


def compute_dtypes(model) -> set[str]:
    """Returns the dtypes that a model's layers compute in."""
    return {layer.compute_dtype for layer in model._flatten_layers()}


def normalizations(model) -> list[keras.layers.BatchNormalization]:
    """Returns all `BatchNormalization` layers, always in the same order."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def stateful_layers(model) -> list[keras.layers.Layer]:
    """Returns the recurrent layers that go on from the batch before."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, (keras.layers.RNN, keras.layers.Bidirectional))
        and layer.stateful
    ]


def global_seed_state() -> list[keras.Variable]:
    """Returns the random state that all layers without their own share.

    It makes that, if it is not there. Each thread has its own.
    """
    return [seed_generator.global_seed_generator().state]


def existing_seed_state() -> list[keras.Variable]:
    """Returns `global_seed_state`, or nothing if this thread has none."""
    # The name of that has a name from 3.10 on.
    name = getattr(
        seed_generator, "GLOBAL_SEED_GENERATOR", "global_seed_generator"
    )
    if global_state.get_global_attribute(name) is None:
        return []
    return global_seed_state()


def calling_operations_through(function):
    """Passes this thread's calls of layers and other operations to `function`.

    A layer has cast its inputs by then, and found their masks.

    Args:
        function: Called as `function(call, operation, *args, **kwargs)`, where
            `call(operation, *args, **kwargs)` does what Keras would.

    Returns:
        A context manager.
    """
    return _calls.calling(function)


def recording_moments(function):
    """Passes what this thread's BatchNormalizations work with to `function`.

    Args:
        function: Called as `function(layer, inputs, mask, means, variances)`;
            None to pass them to nobody.

    Returns:
        A context manager.
    """

    def record(compute, layer, inputs, mask):
        means, variances = compute(layer, inputs, mask)
        function(layer, inputs, mask, means, variances)
        return means, variances

    return _moments.calling(None if function is None else record)


def replacing_moments(function):
    """Has this thread's BatchNormalizations normalize by other moments.

    Args:
        function: Called as `function(compute, layer, inputs, mask)`, where
            `compute(layer, inputs, mask)` computes the inputs' own; it returns
            means and variances.

    Returns:
        A context manager.
    """
    return _moments.calling(function)


@contextlib.contextmanager
def normalizing_by_moving_statistics(model) -> Iterator[None]:
    """Has BatchNormalizations use their moving statistics in training too."""

    def moments(layer):
        return lambda inputs, mask: (
            tf.convert_to_tensor(layer.moving_mean),
            tf.convert_to_tensor(layer.moving_variance),
        )

    with contextlib.ExitStack() as stack:
        for layer in normalizations(model):
            stack.enter_context(attribute(layer, "_moments", moments(layer)))
        yield


def moving_statistics(layer) -> list[keras.Variable]:
    """Returns the variables that a BatchNormalization updates after a batch."""
    names = ["moving_mean", "moving_variance"]
    if renormalizes(layer):
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    return [getattr(layer, name) for name in names]


def renormalizes(layer) -> bool:
    """Returns whether a BatchNormalization has `renorm`, new in Keras 3.14."""
    return getattr(layer, "renorm", False)


def update_renorm_statistics(layer, means, variances) -> None:
    """Updates a BatchNormalization with `renorm` by the moments of a batch.

    No public method does that alone.
    """
    layer._update_renorm_statistics(means, variances)
