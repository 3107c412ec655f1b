"""Finds out where the gradient of a batch stops being finite.

As ordinary code, for layers that are called one after the other:

```python
for layer in layers:
    if is_finite(inputs[layer]) and not is_finite(outputs[layer]):
        return layer, "forward"
for layer in reversed(layers):
    if is_finite(gradient(outputs[layer])) and not (
        is_finite(gradient(inputs[layer])) and is_finite(gradient(weights))
    ):
        return layer, "backward"
```

The real thing knows that layers call layers, and looks for the innermost. What
comes before a layer is seen in the layer's own copy of its inputs: where two
layers have the same inputs, the gradient is the sum of two, and either may be
the bad one.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas
from keras_accum import restoring
from keras_accum import rows as row_counts
from keras_accum import steps
from keras_accum import trial
from keras_accum.first_batch import rows_of
from keras_accum.gradients import values_of


@dataclasses.dataclass(frozen=True)
class Cause:
    """What made a gradient not finite; see `NonfiniteReport`."""

    stage: str
    rows: tuple[int, ...] = ()
    layer: str | None = None
    note: str = ""


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


def find_cause(accumulation, data, size: int | None) -> Cause | None:
    """Replays a batch, and returns what is not finite; None if all is.

    It changes nothing.

    Args:
        accumulation: What the model accumulates in.
        data: The batch, in cross-replica context.
        size: Most rows of a micro-batch; None for all in one.
    """
    strategy = accumulation.model.distribute_strategy
    before, batches = 0, local_batches(strategy, data)
    for local in batches:
        num_rows = rows_of(local)
        for start in range(0, num_rows or 1, size or num_rows or 1):
            part = local
            if size is not None and num_rows is not None:
                stop = min(start + size, num_rows)
                part = row_counts.take(local, start, stop)
            with strategy.scope():
                cause = find_in_microbatch(accumulation, part)
            if cause is None:
                continue
            rows = tuple(before + start + row for row in cause.rows)
            if cause.stage == "input":
                # What is in the other micro-batches is easily seen.
                rows = rows_of_inputs(batches)
            return dataclasses.replace(cause, rows=rows)
        before += num_rows or 0
    return None


def rows_of_inputs(batches: list) -> tuple[int, ...]:
    """Returns which rows of a batch are not finite.

    Args:
        batches: What `local_batches` returned.
    """
    found, before = [], 0
    for local in batches:
        seen = Seen(rows_of(local))
        seen.add(local)
        found += [before + row for row in sorted(seen.rows)]
        before += rows_of(local) or 0
    return tuple(found)


def local_batches(strategy: tf.distribute.Strategy, data) -> list:
    """Returns a batch as each of this worker's replicas has it."""
    leaves = tf.nest.flatten(data)
    local = [strategy.experimental_local_results(leaf) for leaf in leaves]
    return [
        row_counts.as_tensors(tf.nest.pack_sequence_as(data, each))
        for each in zip(*local, strict=True)
    ]


def find_in_microbatch(accumulation, data) -> Cause | None:
    """Returns what is not finite in a micro-batch; None if all is."""
    optimizer = accumulation.model.optimizer
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return replayed(accumulation, data, None)
    if cause := replayed(accumulation, data, 1.0):
        return cause
    scale = float(tf.convert_to_tensor(optimizer.dynamic_scale))
    # The update that the micro-batch was left out of may have halved it.
    for each in (scale, 2 * scale):
        if cause := replayed(accumulation, data, each):
            note = f"with the loss scale {each:g} it overflows"
            return dataclasses.replace(cause, note=note)
    return None


def replayed(accumulation, data, scale: float | None) -> Cause | None:
    """Makes the step of a micro-batch, and returns what is not finite.

    Args:
        accumulation: What the model accumulates in.
        data: The micro-batch.
        scale: What the loss is multiplied by, instead of what the optimizer
            does; None to leave it.
    """
    model = accumulation.model
    record = Record(rows_of(data))
    has_own_step = accumulation.overrides.step("train_step") is not None
    make = gradients_of_own_step if has_own_step else gradients_of
    with contextlib.ExitStack() as stack:
        stack.enter_context(trial.keeping_random_states())
        stack.enter_context(compat.drawing_through(draw, False))
        if scale is not None:
            stack.enter_context(scaling_by(model.optimizer, scale))
        gradients = make(accumulation, data, record.recording)
    bad = {
        id(variable): variable
        for variable, gradient in gradients
        if gradient is not None and not is_finite(values_of(gradient))
    }
    if not bad:
        return None
    return cause_in(record.step, data, set(bad))


def draw(draw_from: Callable, shape):
    """Draws numbers, with no state of any generator."""
    return draw_from(shape, trial.SEED)


def scaling_by(optimizer, scale: float) -> contextlib.AbstractContextManager:
    """Has an optimizer multiply losses by a number."""
    return compat.attribute(
        optimizer, "scale_loss", lambda loss: loss * tf.cast(scale, loss.dtype)
    )


def gradients_of(accumulation, data, recording: Callable) -> list[tuple]:
    """Returns pairs of a trainable variable and its gradient."""
    model = accumulation.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weights = model.trainable_weights
    unassigned = dict.fromkeys(trial.ASSIGNMENTS, trial.unassigned)
    with (
        keras.StatelessScope(collect_losses=True),
        compat.replacing_assignments(unassigned),
        tf.GradientTape() as tape,
    ):
        # Of the inputs there is no gradient otherwise.
        tape.watch([each for each in tf.nest.flatten(x) if is_looked_at(each)])
        with recording():
            y_pred = steps.forward(model, x, training=True)
        loss = compat.compute_loss(model, x, y, y_pred, sample_weight, True)
        loss = model.optimizer.scale_loss(loss)
        # Outside of replicas, the first one's copies are read.
        strategy = model.distribute_strategy
        read = [replicas.copies(strategy, each.value)[0] for each in weights]
        gradients = tape.gradient(loss, read)
    return list(zip(weights, gradients, strict=True))


def gradients_of_own_step(accumulation, data, recording: Callable) -> list:
    """Returns the pairs that a user's own `train_step` accumulates."""
    model = accumulation.model
    options = accumulation.options.replace(nonfinite="propagate")
    with restoring.unchanged(model), contextlib.ExitStack() as stack:
        made = type(accumulation)(model, options, accumulation.overrides)
        stack.enter_context(compat.attribute(model, "_accumulation", made))
        made.losses.findings = accumulation.losses.findings
        made.window["losses"].make_tracker()
        microbatch = stack.enter_context(made.microbatch(data, True))
        stack.enter_context(recording())
        steps.call_train_step(made, microbatch, data)
    variables = model.trainable_weights
    return [
        pair
        for call in microbatch.calls
        for pair in zip(
            call.variables or variables, call.gradients, strict=True
        )
    ]


def cause_in(step: Call, data, bad: set[int]) -> Cause:
    """Returns what made a gradient not finite.

    Args:
        step: What was recorded.
        data: The micro-batch.
        bad: The `id`s of the variables whose gradients are not finite.
    """
    inputs = of_batch(data)
    if any(not call.outputs.is_finite for call in step.calls):
        return cause_in_forward(step, inputs) or Cause("unknown")
    for name, seen in inputs.items():
        if name != "inputs" and not seen.is_finite:
            return Cause("input", tuple(sorted(seen.rows)), note=name)

    def loses_inputs(call):
        ends = call.output_gradients.is_finite
        return ends and not call.input_gradients.is_finite

    def loses_weights(call):
        weights = getattr(call.operation, "trainable_weights", ())
        ids = {id(weight) for weight in weights}
        return call.output_gradients.is_finite and not bad.isdisjoint(ids)

    # Weights second: other layers may share them.
    path = last(step, loses_inputs) or last(step, loses_weights)
    if not path:
        rows = [call.output_gradients.rows for call in step.calls]
        return Cause("loss", tuple(sorted(set().union(*rows))))
    if not (path[-1].inputs.is_finite and path[-1].outputs.is_finite):
        cause = cause_in_forward(step, inputs)
        if cause is not None:
            return cause
    rows = rows_in(path, lambda call: call.input_gradients)
    return Cause("backward", rows, path[-1].name)


def cause_in_forward(step: Call, inputs: dict[str, Seen]) -> Cause | None:
    """Returns what made outputs not finite; None if it is not seen.

    Args:
        step: What was recorded.
        inputs: What `of_batch` returned.
    """
    path = last(step, Call.has_bad_outputs)
    seen = inputs["inputs"]
    # A layer may have made something of missing values, and another has failed.
    if not seen.is_finite and not (path and is_cleaned(step)):
        return Cause("input", tuple(sorted(seen.rows)))
    if not path:
        return None
    for variable in getattr(path[-1].operation, "variables", ()):
        values = Seen(None)
        values.add(tf.convert_to_tensor(variable))
        if not values.is_finite:
            return Cause("weights", layer=variable.path)
    return Cause(
        "forward", rows_in(path, lambda call: call.outputs), path[-1].name
    )


def of_batch(data) -> dict[str, Seen]:
    """Returns what is seen of the parts of a batch, by their names."""
    try:
        parts = keras.utils.unpack_x_y_sample_weight(data)
    except ValueError:
        parts = (data,)
    names = ("inputs", "labels", "sample weights")
    found = {}
    for name, part in zip(names, parts, strict=False):
        found[name] = Seen(rows_of(data))
        found[name].add(part)
    return found


def is_cleaned(call: Call) -> bool:
    """Returns whether any layer makes finite outputs of other inputs."""
    return any(
        each.outputs.is_finite and not each.inputs.is_finite or is_cleaned(each)
        for each in call.calls
    )


def last(call: Call, test: Callable) -> list[Call]:
    """Returns the last call that passes a test, and is in none that does.

    Then, of the calls that it made, the last one that does, and so on. They are
    a list, the innermost one at the end; empty if there is none.

    Args:
        call: What made the calls.
        test: A function of a call.
    """
    for each in reversed(call.calls):
        if test(each):
            return [each, *last(each, test)]
        if path := last(each, test):
            return path
    return []


def rows_in(path: list[Call], seen: Callable) -> tuple[int, ...]:
    """Returns the rows that the innermost call tells that tells any."""
    told = (seen(call).rows for call in reversed(path))
    return tuple(sorted(next(filter(None, told), ())))


def is_finite(values: tf.Tensor) -> bool:
    """Returns whether all entries of a gradient are finite."""
    return bool(tf.reduce_all(finite_entries(values)))
