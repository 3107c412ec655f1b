"""Which layers are recomputed, and where that is exact: in models of ours.

`recomputing.py` says how.
"""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras

from keras_accum import compat
from keras_accum import recomputing
from keras_accum import segments
from keras_accum.checks import check_model
from keras_accum.warned import did_you_mean

# What says which layers: a name, a class, or the layer.
Choice = str | type | keras.Layer


def rematerialize(
    model: keras.Model, layers: Choice | Iterable[Choice]
) -> None:
    """Has layers of a model that exists recomputed, to keep less memory.

    Each keeps what it is given and what it returns. What it computes between
    is computed a second time, where gradients are asked for. Choose layers that
    hold much between: blocks of a transformer, rather than a `Dense` layer. It
    is as if they had been made in a `keras.RematScope`.

    In a functional model, chosen layers that follow one another, with no other
    inputs, are computed the second time together: in segments, of which only
    the first layer keeps what it is given. See `segments.py`.

    Exact in `fit`, `evaluate` and steps of models of this library; in plain
    Keras, on TensorFlow, `fit` raises an error.

    Args:
        model: The model. It traces its functions again.
        layers: Names, classes, or layers, wherever in the model they are; or
            one of these alone. A layer inside of one that is recomputed comes
            and goes with it.

    Raises:
        TypeError: If `model` is no `keras.Model`, or `layers` neither of these
            nor some of them.
        ValueError: If the model has no such layer.
        ImportError: With Keras before 3.9.

    Example:

    ```python
    keras_accum.rematerialize(model, [keras.layers.MultiHeadAttention])
    ```
    """
    check_model(model)
    if isinstance(layers, Choice):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise TypeError(
            "`layers` must be a name, a class or a layer, or a list of these. "
            f"Received: layers={layers!r}"
        )
    all_layers, chosen = compat.all_layers(model), []
    for wanted in layers:
        found = [layer for layer in all_layers if is_meant(layer, wanted)]
        if not found:
            known = [layer.name for layer in all_layers]
            raise ValueError(
                "The model has no layer of this name or class: "
                f"{wanted!r}.{did_you_mean([str(wanted)], known)}"
            )
        chosen += found
    # Only now, so that an error changes nothing.
    for layer in chosen:
        compat.recompute_layer(layer)
    model.train_function = model.test_function = model.predict_function = None


def names_of_layers(model: keras.Model) -> list[str]:
    """Returns the layers of a model, without those in them.

    Of a model in it, its layers: recomputed as a whole, it would need at once
    what it needed before.
    """
    names = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            names += names_of_layers(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            names.append(layer.name)
    return names


@contextlib.contextmanager
def recomputed(model: keras.Model, layers: Iterable[str]) -> Iterator[None]:
    """Has layers recomputed within the context.

    Args:
        model: The model.
        layers: Their names.
    """
    names = set(layers)
    chosen = [each for each in compat.all_layers(model) if each.name in names]
    with compat.recomputing_layers(chosen):
        yield


def is_meant(layer: keras.Layer, wanted: Choice) -> bool:
    """Returns whether a layer has a name or a class, or is the one."""
    if isinstance(wanted, type):
        return isinstance(layer, wanted)
    return layer is wanted or layer.name == wanted


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Makes what is recomputed in this thread exact.

    Layers of a functional model that follow one another are recomputed
    together where that takes less.
    """
    with (
        compat.recomputing_by(recomputing.call),
        compat.recomputing_chains(segments.starts),
    ):
        yield


class ExactCalls:
    """A base class of models: what is recomputed in their calls is exact."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model as Keras does."""
        with exact():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
