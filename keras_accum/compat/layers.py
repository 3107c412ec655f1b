"""The layers of a model: random generators and BatchNormalization."""

import keras
from keras.src.random import seed_generator

from keras_accum.compat.hooks import Hook

_moments = Hook(keras.layers.BatchNormalization, "_moments")


def random_states(model) -> list[keras.Variable]:
    """The states of all random generators of a model's layers."""
    return [
        generator.state
        for layer in model._flatten_layers()
        for generator in layer._seed_generators
    ]


def normalizations(model) -> list[keras.layers.BatchNormalization]:
    """All `BatchNormalization` layers, in an order that is always the same."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def global_seed_state() -> list[keras.Variable]:
    """The state of the random generator that all layers without one share."""
    return [seed_generator.global_seed_generator().state]


def noting_moments(function):
    """Has a function see what this thread's BatchNormalization works with.

    Args:
        function: Called as `function(layer, inputs, mask, means, variances)`.

    Returns:
        A context manager.
    """

    def note(compute, layer, inputs, mask):
        means, variances = compute(layer, inputs, mask)
        function(layer, inputs, mask, means, variances)
        return means, variances

    return _moments.calling(note)


def moving_statistics(layer) -> list[keras.Variable]:
    """What a BatchNormalization assigns when it has seen a batch."""
    names = ["moving_mean", "moving_variance"]
    if layer.renorm:
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    return [getattr(layer, name) for name in names]


def update_renorm_statistics(layer, means, variances) -> None:
    """Does what a BatchNormalization with `renorm` does with a batch's moments.

    No public method does that alone.
    """
    layer._update_renorm_statistics(means, variances)
