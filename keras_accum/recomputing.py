"""Rematerialization that is exact: the second pass is as the first was.

As ordinary code, for a layer that is to keep nothing but what it is given:

```python
with tape.stop_recording():
    outputs = layer(inputs)
...
with tf.GradientTape() as again:  # On the way back.
    gradients = again.gradient(layer(inputs), ..., gradients_of_outputs)
```

The second call would draw other dropout masks, and move BatchNormalization's
statistics once more. So it gets the values that variables had before the first
call assigned them, those of random generators among them, and assigns nothing.

References: T. Chen et al., "Training Deep Nets with Sublinear Memory Cost",
2016; `tf.recompute_grad`, which this stands in for, and of which
`keras.RematScope` and `keras.remat` are made.
"""

from collections.abc import Callable
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum.differentiable import Outputs
from keras_accum.differentiable import computed_after
from keras_accum.differentiable import flat
from keras_accum.differentiable import places_with_gradients
from keras_accum.second_call import NotRepeatable
from keras_accum.second_call import Variables

# By how much two calls may differ in rounding, of the largest output.
ROUNDING = 1e-3


def call(function: Callable, args: tuple, kwargs: dict):
    """Calls a function, and once more where gradients are asked for.

    Args:
        function: What is called: a layer's `call`, or any other function. Its
            gradients are those by the tensors in its arguments, and by
            variables.
        args: Its positional arguments, nested.
        kwargs: Its keyword arguments, nested.

    Returns:
        What the function returns.

    Raises:
        NotRepeatable: If a second call would not be as the first one was.
    """
    if compat.is_made_of_recomputed(function):
        # It keeps nothing itself, and all at once would be no gain.
        return function(*args, **kwargs)
    recomputed = Recomputed(function, args, kwargs)

    @tf.custom_gradient
    def compute(*inputs):
        outputs = recomputed.first(inputs)

        def gradient(*upstream, variables=None):
            gradients = recomputed.gradients(inputs, variables or [], upstream)
            by_inputs = gradients[: len(inputs)]
            if variables is None:
                return by_inputs
            return by_inputs, gradients[len(inputs) :]

        return outputs, gradient

    return recomputed.result(compute(*recomputed.inputs))


def call_once(function: Callable, args: tuple, kwargs: dict):
    """Calls a function as if nothing were recomputed."""
    return function(*args, **kwargs)


class Recomputed:
    """The two calls of a function.

    Args:
        function: As for `call`.
        args: As for `call`.
        kwargs: As for `call`.

    Attributes:
        inputs: The tensors in its arguments that have gradients.
    """

    def __init__(self, function: Callable, args: tuple, kwargs: dict) -> None:
        self._function, self._arguments = function, (args, kwargs)
        self._leaves = flat(self._arguments)
        self._places = places_with_gradients(self._leaves)
        self.inputs = [self._leaves[place] for place in self._places]
        # A call may take them away, as that of an attention layer does.
        self._masks = list(map(compat.keras_mask, self._leaves))
        self._context = compat.CallContext()
        self._graph = compat.current_graph()
        # What variables held before they were assigned, by `id`.
        self._before: dict[int, tuple[keras.Variable, tf.Tensor]] = {}
        with keras.StatelessScope(initialize_variables=False) as scope:
            outer = scope.original_scope
        self._outer = {} if outer is None else dict(outer.state_mapping)

    def first(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Calls it for the first time; returns outputs that have gradients."""
        start = len(self._operations())
        with compat.without_tape(), compat.before_assignments(self._note):
            self._first = Outputs(self._call(self._with(inputs)))
        self._check(self._operations()[start:])
        return self._first.differentiable

    def result(self, outputs: Sequence[tf.Tensor]):
        """Returns what `function` did, made of outputs that have gradients."""
        return self._first.filled(outputs)

    def gradients(self, inputs, variables, upstream) -> list:
        """Calls it again, for gradients; None where there is none.

        Args:
            inputs: What it was called with.
            variables: What other gradients are asked for.
            upstream: The gradients of its outputs.
        """
        # Or the two calls would be taken for one, whose results are kept.
        leaves = computed_after(upstream, self._with(inputs))
        for leaf, mask in zip(leaves, self._masks, strict=True):
            if mask is not None:
                compat.set_keras_mask(leaf, mask)
        assigned = [variable for variable, _ in self._before.values()]
        before = [value for _, value in self._before.values()]
        before = computed_after(upstream, before)
        sources = [leaves[place] for place in self._places]
        with (
            compat.recording_moments(None),
            compat.recording_gradients(None),
        ):
            with (
                tf.GradientTape() as tape,
                self._context(),
                Variables(
                    zip(assigned, before, strict=True), self._outer, tape
                ) as held,
            ):
                tape.watch(sources)
                outputs = Outputs(self._call(leaves))
                self._compare(outputs)
            return held.gradients(
                outputs.differentiable, sources, variables, upstream
            )

    def _call(self, leaves):
        """Calls the function, and returns what it returns and added losses."""
        args, kwargs = tf.nest.pack_sequence_as(
            self._arguments, leaves, expand_composites=True
        )
        added = []
        with compat.collecting_added_losses(
            lambda layer, loss: added.append((layer, keras.tree.flatten(loss)))
        ):
            # What is inside comes and goes with it.
            with compat.recomputing_by(call_once):
                result = self._function(*args, **kwargs)
        return result, added

    def _with(self, inputs):
        """Returns the leaves of the arguments, with other inputs."""
        leaves = list(self._leaves)
        for place, value in zip(self._places, inputs, strict=True):
            leaves[place] = value
        return leaves

    def _note(self, variable):
        """Notes what a variable holds before it is assigned."""
        if compat.current_graph() is not self._graph:
            self._refuse(f"`{variable.path}` is assigned in a loop or a branch")
        if id(variable) not in self._before:
            value = compat.value_without_cast(variable)
            self._before[id(variable)] = variable, value

    def _operations(self):
        return [] if self._graph is None else self._graph.get_operations()

    def _check(self, operations):
        """Raises an error if the second call would not be as the first.

        What is called eagerly shows that later: see `_compare`.
        """
        if self._graph is None:
            return
        assigned = [variable for variable, _ in self._before.values()]
        others = compat.unrepeatable(operations, assigned)
        if others:
            self._refuse(f"TensorFlow's `{others[0]}` is not Keras's")
        # A scope around it may hold such tensors in place of variables.
        if not self._outer:
            lost = self._lost_gradients(operations)
            if lost:
                self._refuse(f"it uses `{lost[0].name}`, and is not given it")

    def _lost_gradients(self, operations):
        """Returns tensors from elsewhere that would have gradients."""
        known = {leaf.ref() for leaf in self._leaves if tf.is_tensor(leaf)}
        here = set(operations)
        used = {
            tensor.ref()
            for operation in operations
            for tensor in operation.inputs
            if tensor.op not in here
        }
        return [
            reference.deref()
            for reference in used - known
            if compat.depends_on_weights(reference.deref())
        ]

    def _compare(self, outputs):
        """Raises an error if eager outputs are not those of the first call."""
        if self._graph is not None:
            return
        for first, second in zip(
            self._first.differentiable, outputs.differentiable, strict=True
        ):
            some, others = np.asarray(first, float), np.asarray(second, float)
            bound = ROUNDING * np.max(np.abs(some), initial=0.0)
            if not np.allclose(some, others, ROUNDING, bound, equal_nan=True):
                self._refuse("a second call gives other outputs")

    def _refuse(self, reason):
        owner = getattr(self._function, "__self__", self._function)
        name = getattr(owner, "name", None) or getattr(
            self._function, "__qualname__", repr(self._function)
        )
        names = getattr(owner, "names", (name,))
        raise NotRepeatable(
            f"`{', '.join(names)}` cannot be recomputed: {reason}. Recomputing "
            "a layer must repeat what it did. Take it out of the "
            "`keras.RematScope`, or have it draw by `keras.random` with a "
            "`SeedGenerator` of its own, assign Keras's variables only, "
            "outside of loops, and be given all tensors that it uses as "
            "arguments.",
            names,
        )
