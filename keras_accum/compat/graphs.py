"""What is being traced, and what XLA compiled of it."""

import math
from typing import NamedTuple

import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.python.client import device_lib
from tensorflow.python.ops import control_flow_util

# How many numbers of each patch Eigen gets memory for: two slices of 320.
DEPTH = 640


def current_graph() -> tf.Graph | None:
    """Returns the graph that this thread is tracing; None if there is none."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def is_compiled_by_xla() -> bool:
    """Returns whether what is traced here is inside a program of XLA's."""
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def stateful_operations() -> list[tf.Operation]:
    """Returns the operations traced here so far that have effects, or may fail.

    No public name says so of an operation.
    """
    return [
        op
        for op in tf.compat.v1.get_default_graph().get_operations()
        if op.op_def is not None and op.op_def.is_stateful
    ]


def uses(graph, variable) -> list[tf.Operation]:
    """Returns the operations of a graph that read or assign a variable.

    Neither a function's captures nor a tensor's consumers are documented.
    """
    return graph.capture(variable.handle).consumers()


def uninitialized(size) -> tf.Tensor:
    """Takes `size` bytes of memory, and writes none of them.

    Rounded up to 256, as by TensorFlow's allocator.
    """
    # An axis has less than 2**31 entries.
    return tf.raw_ops.Empty(shape=[-(-size // 256), 256], dtype=tf.uint8)


def zeros(shape, dtype) -> tf.Tensor:
    """Returns zeros that take memory only while a program uses them.

    TensorFlow makes a constant of `tf.zeros`, which each program keeps.
    """
    return tf.raw_ops.Empty(shape=shape, dtype=dtype, init=True)


def memory_of_device(name: str) -> int | None:
    """Returns the bytes that TensorFlow may use of a device, if it says so.

    Args:
        name: Such as "GPU:0".
    """
    for device in device_lib.list_local_devices():
        if device.name == f"/device:{name}":
            return device.memory_limit or None
    return None


def compute_anyway(value) -> None:
    """Computes a value that nothing needs, in what is traced here."""
    # A stateful op, or TensorFlow would leave out what the value is made of.
    with tf.control_dependencies([tf.convert_to_tensor(value)]):
        tf.raw_ops.Assert(condition=True, data=[0])


class MemoryPlan(NamedTuple):
    """What a call of a program that XLA compiled takes.

    Attributes:
        planned: The most bytes that it allocates, as XLA plans.
        mapped: Addresses that convolutions on a CPU take besides, at most, and
            hardly write to.
    """

    planned: int
    mapped: int


def memory_plan(program, *args) -> MemoryPlan:
    """Returns what a call of a compiled `tf.function` takes.

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
    planned = sum(
        allocation.size
        for allocation in hlo.buffer_assignment.buffer_allocations
        if not allocation.is_entry_computation_parameter
        and not allocation.is_constant
        and not allocation.is_thread_local
    )
    mapped = (
        bytes_for_patches(
            each, {i.id: i.shape for i in computation.instructions}
        )
        for computation in hlo.hlo_module.computations
        for each in computation.instructions
        if each.opcode == "convolution"
    )
    return MemoryPlan(planned, max(mapped, default=0))


def planned_bytes(program, *args) -> int:
    """Returns the most bytes that a call of a compiled `tf.function` allocates.

    Args:
        program: As for `memory_plan`.
        *args: As for `memory_plan`.
    """
    return memory_plan(program, *args).planned


def bytes_for_patches(convolution, shapes) -> int:
    """Returns the most bytes that Eigen allocates for a convolution.

    On a CPU, XLA has Eigen multiply the patches of its input with the kernel.
    Eigen gets memory for all patches at once, but only for up to `DEPTH` of the
    numbers of each, in single precision.

    Source: `EvalParallelContext` in Eigen's `TensorContractionThreadPool.h`,
    and what processes took of addresses.

    Args:
        convolution: The instruction.
        shapes: The shapes of its computation's instructions, by their ids.
    """
    kernel = shapes[convolution.operand_ids[1]].dimensions
    numbers = convolution.convolution_dimension_numbers
    outputs = kernel[numbers.kernel_output_feature_dimension]
    groups = convolution.feature_group_count
    depth = math.prod(kernel) // outputs
    patches = math.prod(convolution.shape.dimensions) // outputs
    # Eigen takes eight of them at once.
    packed = min(-(-depth // 8) * 8, DEPTH)
    return 4 * groups * packed * (patches + outputs // groups)
