"""An update of some variables after others, where nothing else orders it.

XLA plans in which order a program runs. Without it TensorFlow runs what is
ready: of an update, first the mean gradients of all variables, which are there
already when the first of them moves a weight, then a product for each of them,
and so on. All are then in memory at once. What happens here is, as ordinary
code:

```python
for some in groups(variables):
    for variable in some:
        gradient = total[variable] * scale
        optimizer.update_step(gradient, variable, learning_rate)
    wait(some)
```
"""

import contextlib
import math
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import compat

# Fewest entries of a group: within it, small variables run at the same time.
SIZE = 2**18


@contextlib.contextmanager
def one_after_the_other(optimizer: keras.Optimizer) -> Iterator[None]:
    """Makes an optimizer update a group of variables after the other.

    It is for tracing. Of an optimizer that wraps another one, and where XLA
    compiles, it changes nothing.

    Args:
        optimizer: The optimizer.
    """
    if tf.executing_eagerly() or compat.is_compiled_by_xla():
        yield
        return
    graph, update_step = compat.current_graph(), optimizer.update_step
    before: list[tf.Tensor] = []
    group: list[tf.Variable] = []

    def update(gradient, variable, learning_rate):
        nonlocal before, group
        if compat.current_graph() is not graph:
            return update_step(gradient, variable, learning_rate)
        if is_full(group):
            before = [tf.convert_to_tensor(each) for each in group]
            group = []
        group.append(variable)
        with tf.control_dependencies(before):
            return update_step(again(gradient), variable, learning_rate)

    with compat.attribute(optimizer, "update_step", update):
        yield


def groups(variables: Sequence) -> Iterator[list[int]]:
    """Yields the indices of a group of variables after the other."""
    group: list[int] = []
    for index in range(len(variables)):
        group.append(index)
        if is_full([variables[each] for each in group]):
            yield group
            group = []
    if group:
        yield group


def is_full(variables: Iterable) -> bool:
    """Returns whether variables are large enough to be a group."""
    return sum(math.prod(variable.shape) for variable in variables) >= SIZE


def again(value):
    """Returns the same product, computed again if it has to wait.

    TensorFlow leaves out the first one, which nobody uses.

    Args:
        value: A gradient, of any origin.
    """
    if not tf.is_symbolic_tensor(value):
        return value
    op = value.op
    if op.type == "Mul":
        return again(op.inputs[0]) * op.inputs[1]
    if op.type == "Cast":
        return tf.cast(again(op.inputs[0]), value.dtype)
    if op.type == "IdentityN":
        # The sum over one replica. It would wait for all gradients.
        return again(op.inputs[value.value_index])
    return value
