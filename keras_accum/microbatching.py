"""One batch in micro-batches: its rows, so many at a time.

As ordinary code, for a batch of `rows` rows and micro-batches of `size`:

```python
result = first(data[:size])
for start in range(size, rows, size):
    result = further(result, data[start : start + size])
```

The real thing is the same as one loop of TensorFlow, so that the program does
not grow with the batch. The loop stands on the host, around the compiled
programs: XLA on a CPU runs a convolution inside a loop many times slower than
outside. On a TPU it is within the program, as all is there. Rows are taken in
their order from a replica's own part of the batch, so that none moves between
replicas.
"""

from collections.abc import Callable

import tensorflow as tf
from absl import logging

from keras_accum import compat
from keras_accum import programs
from keras_accum import replicas
from keras_accum import weighting
from keras_accum.window import check_positive_int

AUTO = "auto"


class MicrobatchSize:
    """Most rows of a micro-batch: given, or found by trying.

    Args:
        value: A positive int; "auto" to find it; None for all rows of a batch.

    Attributes:
        value: As above; once a size was found, that.
        limit: Where it is sought, the size that the last failure left, or None.
    """

    def __init__(self, value: int | str | None) -> None:
        self.is_sought = isinstance(value, str) and value == AUTO
        if value is not None and not self.is_sought:
            check_positive_int(
                value,
                "`microbatch_size` must be a positive integer, "
                f'"auto" or None. Received: microbatch_size={value!r}',
            )
            value = int(value)
        self.value = value
        self.limit: int | None = None

    @property
    def known(self) -> int | None:
        """Rows to take at once; None for all, also if it is yet to be found."""
        return None if self.value == AUTO else self.value

    def to_try(self, rows: int) -> int:
        """Rows to take at once of a batch of so many, where it is sought."""
        return min(rows, self.limit or rows)

    def note_fit(self, size: int) -> bool:
        """Notes that a size fits; returns whether the value is another now."""
        # A short batch says nothing of longer ones.
        known = self.known or 0
        found = max(size, known) if self.limit is None else self.limit
        if found == self.value:
            return False
        self.value = found
        if known == 0 or self.limit is not None:
            logging.warning(
                'microbatch_size="auto": found that %d rows at once fit on '
                "each replica.",
                found,
            )
        return True


class EachMicrobatch:
    """A function of a batch: steps on the micro-batches of each replica's part.

    It is for the host: in cross-replica context. Where the losses of a batch
    need denominators of their own, these are summed first, in a pass without
    gradients.

    Args:
        model: A `GradientAccumulationModel`.
        first: A step for the first micro-batch, and what totals there are.
        further: A step for the others.
    """

    def __init__(self, model, first: Callable, further: Callable) -> None:
        self._model = model
        # A `tf.function` takes one number of arguments.
        self._without_totals, self._with_totals = (
            [programs.in_loop(model, step) for step in (first, further)]
            for _ in range(2)
        )
        self._measure = programs.in_loop(model, model._addends_of_totals)
        self._fold = programs.with_loop(model, self._fold_part)

    def __call__(self, data, size: int | None):
        """Makes the steps; see `fold`.

        Returns:
            The logs of the last step, on each replica.
        """
        strategy = self._model.distribute_strategy
        number = replicas.number_of_parts(strategy, data, size)
        return self._fold(data, size, number)

    def _fold_part(self, data, size, number):
        data = as_tensors(data)
        if not self._model._uses_totals():
            self._find_out(first_of(data, size))
        (first, further), totals = self._without_totals, ()
        if self._model._uses_totals():
            first, further = self._with_totals
            totals = (self._totals(data, size),)
        return fold(
            data,
            size,
            lambda each: first(each, *totals),
            lambda logs, each: further(each, *totals),
            number,
        )

    def planned_bytes(self, data, size: int) -> int:
        """What a compiled step on `size` rows takes, on all local replicas.

        Args:
            data: A batch, in cross-replica context.
            size: Most rows of a micro-batch.
        """
        model, steps = self._model, self._without_totals
        strategy = model.distribute_strategy
        own = as_tensors(replicas.first_part(strategy, data))
        args = [first_of(own, size)]
        if model._uses_totals():
            steps = self._with_totals
            losses = compat.number_of_losses(compat.compiled_loss(model))
            args.append(weighting.as_weight(tf.zeros(1 + losses)))

        def plan():
            return max(compat.planned_bytes(step, *args) for step in steps)

        return sum(
            strategy.experimental_local_results(
                programs.with_loop(model, plan)()
            )
        )

    def _find_out(self, data):
        """Lets the model see which denominators its losses have."""
        model = self._model
        if model.run_eagerly:
            model._addends_of_totals(data)
        else:
            # It is called later, and not traced a second time.
            first, _ = self._without_totals
            programs.in_graph(first).get_concrete_function(data)

    def _totals(self, data, size):
        total = fold(
            data,
            size,
            self._measure,
            lambda total, each: total + self._measure(each),
        )
        where = self._model._gradient_accumulator().weight
        return replicas.sum_over_replicas(total, where)


def fold(
    data,
    size: int | None,
    first: Callable,
    further: Callable,
    number: tf.Tensor | None = None,
):
    """Calls functions on one micro-batch after the other.

    Args:
        data: A replica's part of a batch: nested tensors, dense, sparse or
            ragged, with rows along the first axis; None stays None.
        size: Most rows of a micro-batch; None for all of `data` in one.
        first: Called with the first micro-batch, also if that has no rows.
        further: Called with what the last call returned, nested tensors, and
            the next micro-batch.
        number: How many micro-batches to make of a number of rows that is not
            known while tracing; None for as many as there are rows for. The
            last ones may have no rows.

    Returns:
        What the last call returned.

    Raises:
        ValueError: If a tensor has no first axis, or they differ in its length.
    """
    if size is None:
        return first(data)
    rows = check_rows(data)
    result = first(first_of(data, size))
    if not isinstance(rows, int):
        number = -(-rows // size) if number is None else number
        return loop(data, size, number, rows, result, further)
    # Where the number of rows is known, so are those of the micro-batches.
    if rows <= size:
        return result
    whole, rest = divmod(rows, size)
    result = loop(data, size, whole, None, result, further)
    if rest:
        result = further(result, take_rows(data, rows - rest, rows, rest))
    return result


def first_of(data, size: int | None):
    """The first micro-batch; see `fold`."""
    if size is None:
        return data
    rows = check_rows(data)
    if not isinstance(rows, int):
        return take_rows(data, 0, tf.minimum(size, rows))
    return take_rows(data, 0, size, size) if rows > size else data


def loop(data, size, number, rows, result, further):
    """Goes on from the second of so many micro-batches.

    Args:
        data: As for `fold`.
        size: Rows of a micro-batch.
        number: How many micro-batches there are.
        rows: Where the last one ends; None if it has `size` rows too.
        result: What came of the first.
        further: As for `fold`.
    """

    def body(index, result):
        start = index * size
        if rows is None:
            piece = take_rows(data, start, start + size, size)
        else:
            stop = tf.minimum(start + size, rows)
            piece = take_rows(data, tf.minimum(start, stop), stop)
        return index + 1, as_tensors(further(result, piece))

    return tf.while_loop(
        lambda index, result: index < number,
        body,
        (tf.constant(1), as_tensors(result)),
        # The next one would need the memory of this one.
        parallel_iterations=1,
    )[1]


def concatenating(model, step: Callable, size: int | None) -> Callable:
    """Returns a function of a batch: what a step returns, put together.

    It is for the host, and returns that of each replica.

    Args:
        model: A `GradientAccumulationModel`.
        step: Returns nested tensors with a row for each of a micro-batch.
        size: Most rows of a micro-batch; None for all in one.
    """
    if size is None:
        return programs.on_replicas(model, step)
    step = programs.in_loop(model, step)
    return programs.with_loop(
        model, lambda data: concatenated(data, size, step)
    )


def concatenated(data, size: int, function: Callable):
    """Calls a function on each micro-batch, and puts its outputs together.

    Args:
        data: As for `fold`.
        size: As for `fold`.
        function: Returns nested tensors with a row for each of its own.
    """
    data = as_tensors(data)
    rows = check_rows(data)
    if isinstance(rows, int) and rows <= size:
        return function(data)
    structure = None

    def first(piece):
        nonlocal structure
        structure = function(piece)
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

    def further(result, piece):
        index, arrays = result
        return index + 1, write(arrays, index + 1, function(piece))

    _, arrays = fold(data, size, first, further)
    return tf.nest.pack_sequence_as(structure, [a.concat() for a in arrays])


def write(arrays, index, outputs):
    """Writes each output to its array; returns the arrays."""
    return [
        array.write(index, output)
        for array, output in zip(arrays, tf.nest.flatten(outputs), strict=True)
    ]


def check_rows(data) -> int | tf.Tensor:
    """The number of rows that all leaves have.

    Raises:
        ValueError: If a leaf has no first axis, or they differ in its length.
    """
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    if any(leaf.shape.rank == 0 for leaf in leaves):
        raise ValueError(wrong_rows(leaves))
    known = {leaf.shape[0] for leaf in leaves} - {None}
    if len(known) > 1:
        raise ValueError(wrong_rows(leaves))
    if known:
        return known.pop()
    numbers = [number_of_rows(leaf) for leaf in leaves]
    message = wrong_rows(leaves)
    checks = [
        tf.debugging.assert_equal(number, numbers[0], message)
        for number in numbers[1:]
    ]
    with tf.control_dependencies(checks):
        return tf.identity(numbers[0])


def wrong_rows(leaves):
    """Says what is wrong with a batch, of these shapes as far as is known."""
    shapes = ", ".join(str(leaf.shape) for leaf in leaves)
    return (
        "With `microbatch_size`, a batch is cut along the first axis, which "
        "must be that of the rows in all of its tensors. "
        f"Received: shapes {shapes}. Give each row its own copy of what has no "
        "such axis, or use `accum_steps`."
    )


def number_of_rows(leaf) -> tf.Tensor:
    """Length of the first axis; an int32 scalar."""
    if isinstance(leaf, tf.RaggedTensor):
        return tf.cast(leaf.nrows(), tf.int32)
    if isinstance(leaf, tf.SparseTensor):
        return tf.cast(leaf.dense_shape[0], tf.int32)
    return tf.shape(leaf)[0]


def take_rows(data, start, stop, size=None):
    """The rows from `start` to `stop` of all leaves.

    Args:
        data: As for `fold`.
        start: The first row.
        stop: The row after the last.
        size: How many these are, if that is known.
    """

    def take(leaf):
        if leaf is None:
            return None
        if isinstance(leaf, tf.SparseTensor):
            shape = leaf.dense_shape
            first, number = (
                tf.cast([each], tf.int64) for each in (start, stop - start)
            )
            taken = tf.sparse.slice(
                leaf,
                tf.concat([first, tf.zeros_like(shape[1:])], axis=0),
                tf.concat([number, shape[1:]], axis=0),
            )
        elif isinstance(leaf, tf.Tensor) and size is not None:
            # A slice of known size, which XLA takes at any place.
            inner = [-1 if n is None else n for n in leaf.shape[1:]]
            begin = [start] + [0] * len(inner)
            taken = tf.slice(leaf, begin, [size, *inner])
        else:
            taken = leaf[start:stop]
        if not isinstance(leaf, tf.RaggedTensor):
            taken.set_shape([size, *leaf.shape[1:]])
        return taken

    return tf.nest.map_structure(take, data)


def as_tensors(structure):
    """All leaves as what a loop of TensorFlow takes; None stays None."""
    known = (tf.SparseTensor, tf.RaggedTensor, tf.TensorArray, type(None))
    return tf.nest.map_structure(
        lambda leaf: (
            leaf if isinstance(leaf, known) else tf.convert_to_tensor(leaf)
        ),
        structure,
    )
