"""The calls of layers in a step: what was finite of them, and what was not."""

import contextlib
import dataclasses

import keras
import tensorflow as tf

from keras_accum import compat


class Seen:
    """Whether all that was seen of tensors is finite, and which rows are not.

    Args:
        num_rows: Rows of the batch; None if that is not known.
    """

    def __init__(self, num_rows: int | None) -> None:
        self._num_rows = num_rows
        self.is_finite = True
        self.rows: set[int] = set()

    def add(self, structure) -> None:
        """Looks at the tensors of a structure; at others it does not."""
        for leaf in tf.nest.flatten(structure, expand_composites=True):
            if not is_looked_at(leaf):
                continue
            is_bad = tf.logical_not(finite_entries(leaf))
            if not bool(tf.reduce_any(is_bad)):
                continue
            self.is_finite = False
            if leaf.shape.rank and leaf.shape[0] == self._num_rows:
                is_bad = tf.reshape(is_bad, [self._num_rows, -1])
                found = tf.where(tf.reduce_any(is_bad, axis=1))
                self.rows |= set(found.numpy().ravel().tolist())


@dataclasses.dataclass
class Call:
    """A call of a layer, or all of a step.

    Attributes:
        operation: The layer, or other operation of Keras; None for the step.
        inputs: What was seen of its inputs.
        outputs: Of its outputs.
        input_gradients: Of gradients with respect to its inputs.
        output_gradients: With respect to its outputs.
        calls: Those that it made, in their order.
    """

    operation: keras.Operation | None
    inputs: Seen
    outputs: Seen
    input_gradients: Seen
    output_gradients: Seen
    calls: list["Call"] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The path of the layer."""
        return getattr(self.operation, "path", None) or self.operation.name

    def has_bad_outputs(self) -> bool:
        """Returns whether it made what is not finite from what is."""
        return self.inputs.is_finite and not self.outputs.is_finite


class Record:
    """The calls of a step.

    Args:
        num_rows: Rows of the batch; None if that is not known.
    """

    def __init__(self, num_rows: int | None) -> None:
        self._num_rows = num_rows
        self.step = self._new_call(None)
        self._open = [self.step]

    def _new_call(self, operation):
        return Call(operation, *(Seen(self._num_rows) for _ in range(4)))

    def recording(self) -> contextlib.AbstractContextManager:
        """Records the calls within the context, of this thread."""
        return compat.calling_operations_through(self._call)

    def _call(self, method, operation, *args, **kwargs):
        call = self._new_call(operation)
        self._open[-1].calls.append(call)
        call.inputs.add((args, kwargs))
        args, kwargs = watched((args, kwargs), call.input_gradients)
        self._open.append(call)
        try:
            outputs = method(operation, *args, **kwargs)
        finally:
            self._open.pop()
        call.outputs.add(outputs)
        return watched(outputs, call.output_gradients)


def is_looked_at(leaf) -> bool:
    """Returns whether something is a tensor of floating numbers, with values.

    What is traced has none.
    """
    return isinstance(leaf, tf.Tensor) and (
        hasattr(leaf, "numpy")
        and (leaf.dtype.is_floating or leaf.dtype.is_complex)
    )


def finite_entries(tensor: tf.Tensor) -> tf.Tensor:
    """Returns which entries are finite; a bool tensor."""
    if tensor.dtype.is_complex:
        return finite_entries(tf.math.real(tensor)) & finite_entries(
            tf.math.imag(tensor)
        )
    return tf.math.is_finite(tensor)


def watched(structure, seen: Seen):
    """Returns tensors, of whose gradients will be told.

    Args:
        structure: Nested tensors, and others, which stay what they are.
        seen: Is given the gradients.
    """

    @tf.custom_gradient
    def tell(tensor):
        def gradient(upstream):
            seen.add(upstream)
            return upstream

        return tf.identity(tensor), gradient

    def watch(leaf):
        if not is_looked_at(leaf):
            return leaf
        told = tell(leaf)
        # Keras attaches masks, and the logits that losses are computed from.
        for name, value in vars(leaf).items():
            setattr(told, name, tell(value) if is_looked_at(value) else value)
        return told

    return keras.tree.map_structure(watch, structure)
