"""Updates that are computed once, to see that they can be, and change nothing.

As ordinary code, where a variable is assigned a value:

```python
compute(value)
variable.assign(variable)
```

The real thing assigns nothing at all.
"""

import contextlib
from collections.abc import Iterator

from keras_accum import compat


@contextlib.contextmanager
def computing_assignments() -> Iterator[None]:
    """Computes what this thread would assign, and assigns nothing.

    For tracing a function that is to need what another needs, and to change
    nothing. Optimizers assign `tf.Variable`s, which `keras.StatelessScope` does
    not know.
    """

    def compute(variable, value):
        compat.compute_anyway(value)
        return variable

    def add(variable, value):
        return compute(variable, variable + value)

    functions = {
        "assign": compute,
        "assign_add": add,
        "assign_sub": add,
        "scatter_add": compute,
        "scatter_sub": compute,
        "scatter_update": compute,
    }
    with compat.replacing_assignments(functions):
        yield
