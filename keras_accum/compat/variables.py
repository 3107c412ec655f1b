"""Variables, and what they are assigned."""

import contextlib
import inspect
from collections.abc import Iterator

import keras
from keras.src import backend
from tensorflow.python.ops import resource_variable_ops

from keras_accum.compat.hooks import Hook

_assignments = Hook(backend.Variable, "_direct_assign")
_optimizers_assignments = Hook(keras.Optimizer, "assign")
# Of the two classes that there are, either may have methods of its own.
_tensorflow_assignments = [
    (name, Hook(owner, name))
    for owner in (
        resource_variable_ops.BaseResourceVariable,
        resource_variable_ops.ResourceVariable,
    )
    for name in vars(owner)
    if name.startswith(("assign", "scatter_"))
]


def assigning_through(function):
    """Passes each value that Keras assigns, in this thread, through `function`.

    Args:
        function: Called as `function(variable, value)`; its result is what
            the `keras.Variable` is assigned.

    Returns:
        A context manager.
    """
    return _assignments.calling(
        lambda assign, variable, value: assign(
            variable, function(variable, value)
        )
    )


def before_assignments(function):
    """Calls `function(variable)` before Keras assigns, in this thread.

    Returns:
        A context manager.
    """
    return _assignments.calling_before(
        lambda variable, value: function(variable)
    )


def are_summed_on_read() -> bool:
    """Returns whether each replica has a metric's variables to itself.

    Before Keras 3.10 all replicas write each other's: the metrics that plain
    Keras reports of several are wrong.
    """
    parameters = inspect.signature(keras.Variable).parameters
    return "synchronization" in parameters


def optimizers_assigning_nothing():
    """Ignores what optimizers assign in this thread, as in their `build`.

    What a checkpoint restores is assigned in other ways.

    Returns:
        A context manager.
    """
    return _optimizers_assignments.calling(lambda *unused: None)


def is_overwritten(variable) -> bool:
    """Returns whether a gradient overwrites the variable, as float8 scales."""
    return getattr(variable, "overwrite_with_gradient", False)


@contextlib.contextmanager
def replacing_assignments(functions) -> Iterator[None]:
    """Replaces methods of `tf.Variable` by functions, in this thread.

    Args:
        functions: By the name of a method that assigns, such as "assign_add":
            called as `function(variable, value)`, they return the variable.
    """

    def replacing(function):
        return lambda method, variable, value, *args, **kwargs: function(
            variable, value
        )

    with contextlib.ExitStack() as stack:
        for name, hook in _tensorflow_assignments:
            if name in functions:
                stack.enter_context(hook.calling(replacing(functions[name])))
        yield
