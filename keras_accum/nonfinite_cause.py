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

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum.first_batch import rows_of
from keras_accum.recorded_calls import Call
from keras_accum.recorded_calls import Seen


@dataclasses.dataclass(frozen=True)
class Cause:
    """What made a gradient not finite; see `NonfiniteReport`."""

    stage: str
    rows: tuple[int, ...] = ()
    layer: str | None = None
    note: str = ""


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
