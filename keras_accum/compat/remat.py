"""Functions that are computed once more on the way back."""

import contextlib
import contextvars
import copy
import functools
import inspect
from collections.abc import Callable
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.eager import record
from tensorflow.python.ops import custom_gradient

from keras_accum.compat.graphs import current_graph
from keras_accum.compat.graphs import uses
from keras_accum.compat.hooks import Hook
from keras_accum.compat.replicas import local_variable

_added_losses = Hook(keras.Layer, "add_loss")
# What a layer's call stands in: how it casts variables, and if it trains.
_CONTEXT = ("autocast_scope", "current_call_ctx")
# How the types begin of operations that are not the same a second time.
_UNREPEATABLE = (
    "Assign",
    "Multinomial",
    "ParameterizedTruncatedNormal",
    "Random",
    "ResourceScatter",
    "Rng",
    "StatefulRandom",
    "StatefulStandardNormal",
    "StatefulTruncatedNormal",
    "StatefulUniform",
)


# What recomputes instead of TensorFlow, in this thread.
_RECOMPUTE = contextvars.ContextVar("keras_accum_recompute", default=None)


@contextlib.contextmanager
def recomputing_by(function: Callable) -> Iterator[None]:
    """Has `function` do what `tf.recompute_grad` does, in this thread.

    `keras.RematScope` and `keras.remat` are made of that.

    Args:
        function: Called as `function(f, args, kwargs)`; it returns what
            `f(*args, **kwargs)` does.
    """
    token = _RECOMPUTE.set(function)
    try:
        yield
    finally:
        _RECOMPUTE.reset(token)


def _decorate(method, inner, args, kwargs):
    """Stands before what TensorFlow calls for a `tf.custom_gradient`."""
    if inner.__qualname__ != "recompute_grad.<locals>.inner":
        return method(inner, args, kwargs)
    recomputed = inspect.getclosurevars(inner).nonlocals["f"]
    if is_for_shapes():
        # TensorFlow would refuse keyword arguments.
        return recomputed(*args, **kwargs)
    recompute = _RECOMPUTE.get()
    if recompute is None:
        return method(inner, args, kwargs)
    return recompute(recomputed, args, kwargs)


# For as long as the process lives: the layers of a model are called before
# there is a model of ours.
for _name in ("_graph_mode_decorator", "_eager_mode_decorator"):
    setattr(
        custom_gradient,
        _name,
        functools.partial(_decorate, getattr(custom_gradient, _name)),
    )


def is_for_shapes() -> bool:
    """Returns whether Keras asks for shapes alone, as when a model is made."""
    return global_state.get_global_attribute("symbolic_scope") is not None


def recompute(function: Callable, args: tuple, kwargs: dict):
    """Calls a function by that of `recomputing_by`, if there is one."""
    by = _RECOMPUTE.get()
    return (
        function(*args, **kwargs) if by is None else by(function, args, kwargs)
    )


def is_made_of_recomputed(function) -> bool:
    """Returns whether it is the call of a model whose layers are recomputed."""
    model = getattr(function, "__self__", None)
    return isinstance(model, keras.Model) and any(
        map(_is_recomputed, model._flatten_layers(include_self=False))
    )


def _is_recomputed(layer):
    mode = getattr(layer, "_remat_mode", None)
    if mode is None or mode.mode != "list_of_layers":
        return mode is not None and mode.mode is not None
    return layer.name in mode.layer_names


def is_recomputed_whole(layer) -> bool:
    """Returns whether all of a layer is recomputed, whatever its size."""
    mode = getattr(layer, "_remat_mode", None)
    return _is_recomputed(layer) and mode.mode in ("full", "list_of_layers")


def recompute_layer(layer) -> None:
    """Has a layer recomputed as if it had been made in a `keras.RematScope`.

    Raises:
        ImportError: Before Keras 3.9, which has none.
    """
    if not hasattr(keras, "RematScope"):
        raise ImportError(
            "`rematerialize` needs Keras 3.9 or newer: older ones have no "
            "`keras.RematScope`."
        )
    with keras.RematScope("full"):
        # Any layer: this is what the scope sets.
        mode = keras.layers.Identity()._remat_mode
    layer._remat_mode = mode


@contextlib.contextmanager
def recomputing_layers(layers) -> Iterator[None]:
    """Has layers recomputed as `recompute_layer` does, and then as before."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            mode = getattr(layer, "_remat_mode", None)
            stack.callback(setattr, layer, "_remat_mode", mode)
            recompute_layer(layer)
        yield


def collecting_added_losses(function: Callable):
    """Calls `function(layer, loss)` in place of `add_loss`, in this thread.

    Returns:
        A context manager.
    """
    return _added_losses.calling(
        lambda method, layer, loss: function(layer, loss)
    )


def without_tape():
    """Returns a context manager in which no tape records anything."""
    return record.stop_recording()


class CallContext:
    """What the call of a layer stands in, to enter it again later."""

    def __init__(self) -> None:
        self._attributes = {
            # It changes from layer to layer.
            name: copy.copy(global_state.get_global_attribute(name))
            for name in _CONTEXT
        }

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Enters it."""
        before = {
            name: global_state.get_global_attribute(name) for name in _CONTEXT
        }
        self._set(self._attributes)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, attributes):
        for name, value in attributes.items():
            global_state.set_global_attribute(name, copy.copy(value))


def tensorflow_variable(variable) -> tf.Variable:
    """Returns the `tf.Variable` in a `keras.Variable`, as tapes know it."""
    return variable._value


def value_without_cast(variable) -> tf.Tensor:
    """Returns what a `keras.Variable` holds, whatever layers compute in."""
    return tf.identity(tf.convert_to_tensor(tensorflow_variable(variable)))


def depends_on_weights(tensor) -> bool:
    """Returns whether a tensor of a graph is computed from variables.

    Only floating numbers have gradients: what is computed from the state of a
    random generator is not meant.
    """
    seen, others = set(), [tensor]
    while others:
        tensor = others.pop()
        if tensor.ref() in seen or not tensor.dtype.is_floating:
            continue
        seen.add(tensor.ref())
        if tensor.op.type in ("ReadVariableOp", "ResourceGather"):
            return True
        others.extend(tensor.op.inputs)
    return False


def unrepeatable(operations, assigned) -> list[str]:
    """Returns what in a graph would not be the same a second time.

    Args:
        operations: Those of the graph that are to be repeated.
        assigned: Variables that may be assigned.

    Returns:
        The types of operations that draw random numbers, and remember how many
        they drew; and of those that assign other variables.
    """
    known: set[tf.Operation] = set()
    for variable in assigned:
        local = local_variable(tensorflow_variable(variable))
        known.update(uses(current_graph(), local))
    return [
        op.type
        for op in operations
        if op.op_def is not None
        and op.op_def.is_stateful
        and op not in known
        and op.type.startswith(_UNREPEATABLE)
    ]
