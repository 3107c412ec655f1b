"""What runs when: after a batch is there, after a step is over, in a branch."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas


def tensors_in(structure) -> list[tf.Tensor]:
    """Returns the tensors of a structure that holds None and other leaves."""
    return [
        leaf
        for leaf in tf.nest.flatten(structure, expand_composites=True)
        if isinstance(leaf, tf.Tensor)
    ]


def wait_for(structure) -> None:
    """Waits for the tensors of a structure, which devices may still compute."""
    for each in tensors_in(structure):
        each.numpy()


def after(structure) -> AbstractContextManager:
    """Makes all that is called within wait for the tensors of a structure."""
    return tf.control_dependencies(tensors_in(structure))


def choose(condition: bool | tf.Tensor, if_true: Callable, if_false: Callable):
    """Calls one of two functions: Python picks, or the device.

    Args:
        condition: A bool, or a bool scalar.
        if_true: A function without arguments, of nested tensors.
        if_false: Another.
    """
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    return tf.cond(condition, if_true, if_false)


def if_there(data, function: Callable, anything: tf.Variable):
    """Calls a function, or does nothing if there was no batch.

    An exhausted iterator stops what depends on its data, and nothing else. A
    branch of a conditional depends on them as a whole. So there is one, with a
    single branch.

    Args:
        data: The batch.
        function: A function without arguments, of nested tensors.
        anything: An int64 scalar. TensorFlow would put a branch that is
            chosen by a constant in the conditional's place.
    """
    with after(data):
        return tf.switch_case(tf.cast(anything, tf.int32), [function])


def after_all_ops(tensors=()) -> list[tf.Operation]:
    """Returns what to wait for, so that the step so far can no longer fail.

    In a graph, TensorFlow runs an assignment as soon as its inputs are there,
    while a check, a metric or a later layer's gradient may still fail: some
    buffers would then hold a micro-batch that never was. An op of type
    NoOp stands for all of them; edges from each to each would be quadratic.

    Args:
        tensors: What is waited for besides.

    Returns:
        Control inputs.
    """
    if tf.executing_eagerly():
        return []
    stateful = compat.stateful_operations()
    if replicas.has_several(tf.distribute.get_strategy()):
        # The other replicas may be in the same graph, and are not waited for.
        here = tf.no_op().device
        stateful = [op for op in stateful if op.device in (here, "")]
    with tf.control_dependencies([*stateful, *tensors]):
        return [tf.no_op()]
