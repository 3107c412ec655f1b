"""Assignments that count only if a condition holds, which the device knows.

As ordinary code:

```python
before = [variable.value() for variable in variables]
update()
for variable, value in zip(variables, before):
    variable.assign(tf.where(condition, variable, value))
```

The real thing selects in each assignment of the update, not after the last one.
An update reads what it has assigned: a moment, to move a weight. If that is not
what the moment's variable holds in the end, XLA on a CPU copies all moments
first, and computes them again where they are read: Adam's update of 9 million
weights takes 1.6 times as long.
"""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence

import tensorflow as tf

from keras_accum import compat

# Uses of a variable that leave it as it is.
_READS = {"ReadVariableOp", "VariableShape", "VarIsInitializedOp"}


@contextlib.contextmanager
def assigning_if(
    condition: tf.Tensor, variables: Sequence[tf.Variable]
) -> Iterator[None]:
    """Makes assignments within the context count only if a condition holds.

    Args:
        condition: A bool scalar.
        variables: Of one replica.
    """
    guards = [Guard(condition, variable) for variable in variables]
    with contextlib.ExitStack() as stack:
        for guard in guards:
            stack.enter_context(guard.guarding())
        yield
    for guard in guards:
        guard.close()


class Guard:
    """A variable whose assignments count only if a condition holds.

    Args:
        condition: A bool scalar.
        variable: The variable.
    """

    def __init__(self, condition: tf.Tensor, variable: tf.Variable) -> None:
        self._condition, self._variable = condition, variable
        self._assign = variable.assign
        self._graph = compat.current_graph()
        self._before = tf.identity(variable)
        self._num_writes_before = len(self._writes())
        self._selected = 0

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Makes the methods that assign the whole variable select."""
        with contextlib.ExitStack() as stack:
            for name, value_of in (
                ("assign", lambda value: value),
                ("assign_add", lambda delta: self._variable + delta),
                ("assign_sub", lambda delta: self._variable - delta),
            ):
                method = self._selecting(value_of)
                stack.enter_context(
                    compat.attribute(self._variable, name, method)
                )
            yield

    def close(self) -> None:
        """Selects now, if any assignment was not seen."""
        # Not seen are assignments in a conditional, by methods that assign some
        # entries, or, on TPUs, of all copies by one name.
        writes = len(self._writes()) - self._num_writes_before
        if not self._selected or writes != self._selected:
            self._assign(self._select(self._variable))

    def _selecting(self, value_of):
        def assign(value, *args, **kwargs):
            value = tf.cast(value, self._variable.dtype)
            # What a conditional assigns is not among the writes either.
            if compat.current_graph() is self._graph:
                self._selected += 1
            return self._assign(self._select(value_of(value)), *args, **kwargs)

        return assign

    def _select(self, value):
        return tf.where(self._condition, value, self._before)

    def _writes(self):
        """Returns the ops of this graph that may assign the variable."""
        if self._graph is None:
            return []
        uses = compat.uses(self._graph, self._variable)
        return [op for op in uses if op.type not in _READS]
