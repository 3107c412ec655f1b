"""The layers of a model: random generators and BatchNormalization."""

import keras
from keras.src.random import seed_generator

from keras_accum.compat.hooks import Hook

_moments = Hook(keras.layers.BatchNormalization, "_moments")


def random_states(model) -> list[keras.Variable]:
    """Returns the states of all random generators of a model's layers."""
    return [
        generator.state
        for layer in model._flatten_layers()
        for generator in layer._seed_generators
    ]


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
    """Returns the random state that all layers without their own share."""
    return [seed_generator.global_seed_generator().state]


def recording_moments(function):
    """Passes what this thread's BatchNormalizations work with to `function`.

    Args:
        function: Called as `function(layer, inputs, mask, means, variances)`.

    Returns:
        A context manager.
    """

    def record(compute, layer, inputs, mask):
        means, variances = compute(layer, inputs, mask)
        function(layer, inputs, mask, means, variances)
        return means, variances

    return _moments.calling(record)


def moving_statistics(layer) -> list[keras.Variable]:
    """Returns the variables that a BatchNormalization updates after a batch."""
    names = ["moving_mean", "moving_variance"]
    if layer.renorm:
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    return [getattr(layer, name) for name in names]


def update_renorm_statistics(layer, means, variances) -> None:
    """Updates a BatchNormalization with `renorm` by the moments of a batch.

    No public method does that alone.
    """
    layer._update_renorm_statistics(means, variances)
