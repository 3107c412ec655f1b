"""`microbatch_size="auto"` and "largest": sizes that fit, found by trying.

As ordinary code:

```python
while True:
    state = copies_of(variables)
    try:
        logs = add_all_microbatches(batch, size)
        break
    except OutOfMemory:
        restore(state)
        size = ceil(size / 2)
update()
```

so that no batch is lost, none is seen twice, and a failed attempt leaves
nothing behind. It begins with the whole batch. The real thing differs in three
ways. The copies are references to the values, which cost nothing until a step
assigns others. The update does not depend on the size and cannot be taken back,
so that it is rehearsed first, where it could fail half way. And a CPU is not
asked for what it is known not to have: see `memory`.

References: `device_train_microbatch_size="auto"` of MosaicML's Composer, which
does the same for PyTorch.
"""

import functools
import gc
import re
import time
from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf

from keras_accum import boundary
from keras_accum import compat
from keras_accum import discovery
from keras_accum import each_microbatch
from keras_accum import memory
from keras_accum import programs
from keras_accum import rehearsal
from keras_accum import replicas
from keras_accum import restoring
from keras_accum import rows as row_counts
from keras_accum import saving
from keras_accum.control_flow import wait_for


class Attempts:
    """A function that trains on a batch, in the size that it finds to fit.

    Args:
        accumulation: What the model accumulates in.
        each: The `EachMicrobatch` that trains.
    """

    def __init__(
        self, accumulation, each: each_microbatch.EachMicrobatch
    ) -> None:
        self._accumulation = accumulation
        self._attempt = Attempt(accumulation, each)
        self._rehearse = make_rehearsal(accumulation)
        # The model's own variables, once it is built.
        self._own: list[tf.Variable] | None = None

    def __call__(self, args: tuple):
        """Adds a batch to the window, in micro-batches; returns the logs.

        Args:
            args: The batch alone, as for `programs.on_replicas`.
        """
        (data,), accumulation = args, self._accumulation
        if self._own is None:
            discovery.build_for(accumulation, data)
            self._own = restoring.own_variables(accumulation.model)
        strategy = accumulation.model.distribute_strategy
        # A worker may get no rows, of a last batch that is short.
        counts = row_counts.local_counts(strategy, data)
        rows = max(1, *map(int, counts))
        sizes = accumulation.size
        limit = sizes.limit
        while True:
            size = sizes.to_try(rows)
            snapshot = snapshot_of(accumulation, self._own)
            start = time.perf_counter()
            (logs, smaller), failure = catching(self._attempt, data, size)
            if sizes.is_timed(rows):
                wait_for(logs)
            seconds = time.perf_counter() - start
            if failure:
                smaller = size // 2
            # All workers go on together, or try again together.
            if not failed_anywhere(strategy, logs is None):
                break
            snapshot.restore()
            smaller = replicas.least_of_all(
                strategy, size if logs is not None else smaller
            )
            if smaller == 0:
                sizes.limit = limit
                raise does_not_fit("One row", failure)
            sizes.record_failure(replicas.least_of_all(strategy, size), smaller)
        _, failure = catching(self._rehearse)
        if failed_anywhere(strategy, failure is not None):
            snapshot.restore()
            raise does_not_fit("The optimizer's update", failure)
        is_new = sizes.record_fit(replicas.least_of_all(strategy, size))
        # The clocks of several workers do not agree.
        if not replicas.has_several_workers(strategy):
            is_new |= sizes.record_time(size, rows, seconds)
            if sizes.is_timed(rows) and not self._attempt.has_room_to_make():
                is_new |= sizes.end_timing()
        if is_new:
            model = accumulation.model
            model.test_function = model.predict_function = None
        return logs


class Attempt:
    """A function that adds a batch to the buffers, in micro-batches of a size.

    It returns the logs, and None. Where the memory is known not to be enough,
    it returns None, and a smaller size, or 0 if there is none. If the memory
    runs out on the way it raises, and variables may hold anything.

    Args:
        accumulation: What the model accumulates in.
        each: The `EachMicrobatch` that trains.
    """

    def __init__(
        self, accumulation, each: each_microbatch.EachMicrobatch
    ) -> None:
        self._accumulation, self._each = accumulation, each
        self._by_size: dict[int, Callable] = {}
        model = accumulation.model
        is_compiled = model.jit_compile and not model.run_eagerly
        needed = each.memory_plan if is_compiled else self._count_bytes
        update = functools.cache(
            functools.partial(boundary.planned_bytes, model)
        )
        to_save = functools.partial(saving.bytes_to_save, model)
        self._room = memory.Room(needed, is_compiled, update, to_save)

    def __call__(self, data, size: int):
        """Tries to add a batch in micro-batches of `size` rows."""
        accumulation = self._accumulation
        weight = accumulation.window["gradients"].make_accumulator().weight
        if replicas.on_cpu(weight):
            strategy = accumulation.model.distribute_strategy
            shapes, count = shapes_of(strategy, data), bytes_of(strategy, data)
            rows = self._room.most_rows(data, shapes, size, count)
            if rows < size:
                return None, rows
        return self._by(size)((data,)), None

    def has_room_to_make(self) -> bool:
        """Returns whether there is room for steps of one more size."""
        return self._room.has_room_to_make()

    def _by(self, size):
        """Returns a function of a batch, which does not trace steps again."""
        if size not in self._by_size:
            by_size = functools.partial(self._each, size=size)
            if not self._accumulation.model.run_eagerly:
                by_size = programs.in_graph(by_size, reduce_retracing=True)
            self._by_size[size] = by_size
        return self._by_size[size]

    def _count_bytes(self, data, rows: int, counted: Callable) -> int:
        """Returns what a step on `rows` rows takes, as `counted` says."""
        accumulation, model = self._accumulation, self._accumulation.model
        snapshot = snapshot_of(accumulation)

        def few(data, rows):
            return row_counts.take_first(row_counts.as_tensors(data), rows)

        try:
            # Two micro-batches: the steps for both kinds are then traced,
            # while there is room for that.
            take = programs.with_loop(model, few)
            few_rows = programs.in_graph(take)(data, 2 * rows)
            add = self._by(rows)
            # What it makes once is no part of it.
            add((few_rows,))
            return counted(add, (few_rows,))
        finally:
            snapshot.restore()


def make_rehearsal(accumulation) -> Callable:
    """Returns a function that computes what an update would assign, once.

    An update that is not compiled assigns some variables before the memory for
    others is asked for. If there was enough to compute all of them, there is
    enough for the update. XLA asks for everything first.
    """
    model, window = accumulation.model, accumulation.window
    is_done = model.jit_compile or replicas.on_tpu(model.distribute_strategy)

    def rehearse():
        gradients = window["gradients"]
        for update in gradients.updates(gradients.sums()):
            with (
                rehearsal.computing_assignments(),
                boundary.updating_local_copies(model, update.optimizer),
            ):
                update.apply()

    function = programs.in_graph(programs.running(model, rehearse))

    def run():
        nonlocal is_done
        if not is_done:
            function()
        is_done = True

    return run


def snapshot_of(accumulation, own: Sequence | None = None) -> replicas.Snapshot:
    """Returns what steps assign, except the buffers, which start anew.

    Args:
        accumulation: What the model accumulates in.
        own: See `restoring.variables_of`.
    """
    model, window = accumulation.model, accumulation.window
    # A step may be the first that draws.
    variables = [each.value for each in compat.global_seed_state()]
    variables += restoring.variables_of(model, own)
    listed = set(map(id, [*window["gradients"].variables, *variables]))
    variables += [v for v in window.variables if id(v) not in listed]
    return replicas.Snapshot(model.distribute_strategy, variables)


def local_leaves(strategy, data):
    """Returns all tensors of a batch, of each of this worker's replicas."""
    return [
        local
        for leaf in tf.nest.flatten(data)
        if leaf is not None
        for local in strategy.experimental_local_results(leaf)
    ]


def shapes_of(strategy, data):
    """Returns shapes without the rows: they decide a step's memory per row."""
    return tuple(
        tuple(leaf.shape[1:].as_list()) for leaf in local_leaves(strategy, data)
    )


def bytes_of(strategy, data):
    """Returns the bytes of a batch, on all of this worker's replicas."""
    return sum(
        tensor.dtype.size * tensor.shape.num_elements()
        for leaf in local_leaves(strategy, data)
        for tensor in tf.nest.flatten(leaf, expand_composites=True)
    )


def failed_anywhere(strategy, has_failed):
    """Returns whether anything has failed on any worker."""
    return replicas.least_of_all(strategy, 0 if has_failed else 1) == 0


def catching(function, *args):
    """Calls a function that may run out of memory.

    Returns:
        What it returned, and None; or two None, and what the error says.
    """
    try:
        return function(*args), None
    except (tf.errors.OpError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
    # It would keep alive what it passed by. In a model that runs eagerly, it
    # and frames of Keras's have each other.
    gc.collect()
    return (None, None), said


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a device, or the process, ran out of memory."""
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        return True
    # Some of CUDA's libraries have errors of other kinds for it.
    return bool(re.search(r"(?i)out of memory|\bOOM\b", str(error)))


def does_not_fit(what, failure):
    """Returns the error to raise when no smaller size would help."""
    return tf.errors.ResourceExhaustedError(
        None,
        None,
        f"{what} does not fit in the memory of the device, and "
        '`microbatch_size="auto"` can do no more. The model is as it was '
        "before this batch. Make the model, its rows or the optimizer's state "
        f"smaller. Received: {failure or 'less memory than is needed'}",
    )
