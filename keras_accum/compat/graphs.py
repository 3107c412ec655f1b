"""What is being traced, and what XLA compiled of it."""

import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.python.ops import control_flow_util


def current_graph() -> tf.Graph | None:
    """What is being traced in this thread; None if nothing is."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def is_compiled_by_xla() -> bool:
    """Whether what is traced here is a part of a program of XLA's."""
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def compute_anyway(value) -> None:
    """Has what is traced here compute a value that nothing needs."""
    # A stateful op, or TensorFlow would leave out what the value is made of.
    with tf.control_dependencies([tf.convert_to_tensor(value)]):
        tf.raw_ops.Assert(condition=True, data=[0])


def planned_bytes(program, *args) -> int:
    """What a compiled `tf.function` allocates when it is called, at most.

    XLA plans that when it compiles. No public name has it; the format is XLA's
    `HloProto`.

    Args:
        program: The `tf.function`, with `jit_compile`.
        *args: Its arguments: nested tensors, or flat `tf.TensorSpec`s.
    """
    hlo = hlo_pb2.HloProto.FromString(
        program.experimental_get_compiler_ir(*args)(
            stage="optimized_hlo_proto_serialized"
        )
    )
    return sum(
        allocation.size
        for allocation in hlo.buffer_assignment.buffer_allocations
        if not allocation.is_entry_computation_parameter
        and not allocation.is_constant
        and not allocation.is_thread_local
    )
