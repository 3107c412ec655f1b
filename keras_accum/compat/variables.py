"""Variables, and what they are assigned."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from keras.src import backend
from tensorflow.python.ops import resource_variable_ops

from keras_accum.compat.hooks import Hook

_assignments = Hook(backend.Variable, "_direct_assign")


def assigning_through(function):
    """Has a function say what Keras's variables are assigned, in this thread.

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


def is_overwritten(variable) -> bool:
    """Whether a variable is assigned its gradient, as the scales of float8."""
    return getattr(variable, "overwrite_with_gradient", False)


@contextlib.contextmanager
def computing_assignments() -> Iterator[None]:
    """Lets `tf.Variable`s be assigned nothing: the values are only computed.

    For tracing a function that is to need what another needs, and to change
    nothing. Optimizers assign `tf.Variable`s, which `keras.StatelessScope` does
    not know.
    """

    def compute(variable, value, *unused_args, **unused_kwargs):
        # A stateful op, or TensorFlow would leave out what it is made of.
        with tf.control_dependencies([tf.convert_to_tensor(value)]):
            tf.raw_ops.Assert(condition=True, data=[0])
        return variable

    def add(variable, value, *unused_args, **unused_kwargs):
        return compute(variable, variable + value)

    methods = {
        "assign": compute,
        "assign_add": add,
        "assign_sub": add,
        "scatter_add": compute,
        "scatter_sub": compute,
        "scatter_update": compute,
    }
    with contextlib.ExitStack() as stack:
        # Of the two that there are, either may have methods of its own.
        for owner in (
            resource_variable_ops.BaseResourceVariable,
            resource_variable_ops.ResourceVariable,
        ):
            for name in methods.keys() & vars(owner).keys():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, methods[name])
        yield
