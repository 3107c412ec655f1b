"""One batch in micro-batches: a number of its rows at a time.

As ordinary code, for a batch of `rows` rows and micro-batches of `size`:

```python
result = first(data[:size])
for start in range(size, rows, size):
    result = next(result, data[start : start + size])
```

The real thing is the same as one loop of TensorFlow, so that the program does
not grow with the batch. The loop stands on the host, around the compiled
programs: XLA on a CPU runs a convolution inside a loop many times slower than
outside. On a TPU it is within the program, as all is there. Rows are taken in
their order from those that a replica has of the batch, so that none moves
between replicas.
"""

from collections.abc import Callable

import tensorflow as tf

from keras_accum import programs
from keras_accum import rows as row_counts
from keras_accum.rows import as_tensors
from keras_accum.rows import take
from keras_accum.rows import take_first


def fold(
    data,
    size: int | None,
    first: Callable,
    next_: Callable,
    num_microbatches: tf.Tensor | None = None,
):
    """Calls functions on one micro-batch after the other.

    Args:
        data: A replica's rows of a batch: nested tensors, dense, sparse or
            ragged, with rows along the first axis; None stays None.
        size: Most rows of a micro-batch; None for all of `data` in one.
        first: Called with the first micro-batch, also if that has no rows.
        next_: Called with what the last call returned, nested tensors, and
            the next micro-batch.
        num_microbatches: How many to make of a number of rows that is not known
            while tracing; None for as many as there are rows for. The last ones
            may have no rows.

    Returns:
        What the last call returned.

    Raises:
        ValueError: If a tensor has no first axis, or they differ in its length.
    """
    if size is None:
        return first(data)
    rows = row_counts.check_count(data)
    result = first(take_first(data, size))
    if not isinstance(rows, int):
        num_microbatches = (
            -(-rows // size) if num_microbatches is None else num_microbatches
        )
        return loop(data, size, num_microbatches, rows, result, next_)
    # Where the number of rows is known, so are those of the micro-batches.
    if rows <= size:
        return result
    whole, rest = divmod(rows, size)
    result = loop(data, size, whole, None, result, next_)
    if rest:
        result = next_(result, take(data, rows - rest, rows, rest))
    return result


def loop(data, size, num_microbatches, rows, result, next_):
    """Calls `next_` on all micro-batches from the second on; see `fold`.

    Args:
        data: As for `fold`.
        size: Rows of a micro-batch.
        num_microbatches: How many micro-batches there are.
        rows: Where the last one ends; None if it has `size` rows too.
        result: What came of the first.
        next_: As for `fold`.
    """

    def body(index, result):
        start = index * size
        if rows is None:
            microbatch = take(data, start, start + size, size)
        else:
            stop = tf.minimum(start + size, rows)
            microbatch = take(data, tf.minimum(start, stop), stop)
        return index + 1, as_tensors(next_(result, microbatch))

    return tf.while_loop(
        lambda index, result: index < num_microbatches,
        body,
        (tf.constant(1), as_tensors(result)),
        # The next one would need the memory of this one.
        parallel_iterations=1,
    )[1]


def concatenating(model, step: Callable, size: int | None) -> Callable:
    """Returns a function of a batch, which concatenates what a step returns.

    It is for the host, and returns a result for each replica.

    Args:
        model: A `GradientAccumulationModel`.
        step: Returns nested tensors with a row for each of a micro-batch.
        size: Most rows of a micro-batch; None for all in one.
    """
    if size is None:
        run = programs.on_replicas(model, step)
        return lambda data: run(args=(data,))
    step = programs.in_loop(model, step)
    return programs.with_loop(
        model, lambda data: concatenated(data, size, step)
    )


def concatenated(data, size: int, function: Callable):
    """Calls a function on each micro-batch, and concatenates its outputs.

    Args:
        data: As for `fold`.
        size: As for `fold`.
        function: Returns nested tensors with a row for each row that it gets.
    """
    data = as_tensors(data)
    rows = row_counts.check_count(data)
    if isinstance(rows, int) and rows <= size:
        return function(data)
    structure = None

    def first(microbatch):
        nonlocal structure
        structure = function(microbatch)
        arrays = [
            tf.TensorArray(
                output.dtype,
                size=-(-rows // size),
                dynamic_size=True,
                infer_shape=False,
                element_shape=[None, *output.shape[1:]],
            )
            for output in tf.nest.flatten(structure)
        ]
        return tf.constant(0), write(arrays, 0, structure)

    def next_(result, microbatch):
        index, arrays = result
        return index + 1, write(arrays, index + 1, function(microbatch))

    _, arrays = fold(data, size, first, next_)
    return tf.nest.pack_sequence_as(structure, [a.concat() for a in arrays])


def write(arrays, index, outputs):
    """Writes each output to its array; returns the arrays."""
    return [
        array.write(index, output)
        for array, output in zip(arrays, tf.nest.flatten(outputs), strict=True)
    ]
