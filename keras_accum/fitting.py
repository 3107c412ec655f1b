"""`microbatch_size="auto"`: the largest size that fits, found by trying.

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
asked for what it is known not to have: see `forecast`.

References: `device_train_microbatch_size="auto"` of MosaicML's Composer, which
does the same for PyTorch.
"""

import functools
import re

import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import forecast
from keras_accum import microbatching
from keras_accum import programs
from keras_accum import rehearsal
from keras_accum import replicas
from keras_accum import training


def make_fitting_function(model, update, traced):
    """Returns a function of an iterator, which trains on batches from it.

    Args:
        model: A `GradientAccumulationModel` with `microbatch_size="auto"`.
        update: As for `training.make_train_function`.
        traced: As for `training.make_step_function`.
    """
    fetch = make_fetching_function(model)
    step = make_fitting_step(model, update, traced)

    def function(iterator):
        logs = None
        for _ in range(model.steps_per_execution):
            try:
                data = fetch(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise
                break
            logs = step(data)
        return logs

    return function


def make_fetching_function(model):
    """Returns a function that takes one batch from an iterator."""
    fetch = training.make_iterating_function(model, lambda data: data, 1)

    def function(iterator):
        data = fetch(iterator)
        if data is None:  # An iterator of Python's has ended.
            raise StopIteration
        return tf.nest.map_structure(
            lambda leaf: (
                tf.convert_to_tensor(leaf)
                if isinstance(leaf, np.ndarray)
                else leaf
            ),
            data,
        )

    return function


def make_fitting_step(model, update, traced):
    """Returns a function of one batch, which finds the size that fits it."""
    strategy = model.distribute_strategy
    attempt = make_attempt(model, traced)
    rehearse = make_rehearsal(model)

    def finish(known, logs):
        return training.newer(logs, update())

    if replicas.has_several(strategy) and not model.run_eagerly:
        finish = programs.in_graph(finish)

    is_built = False

    def step(data):
        nonlocal is_built
        if not is_built:
            model._build_for(data)
            is_built = True
        # A worker may get no rows, of a last batch that is short.
        rows = max(1, *(int(r) for r in replicas.local_rows(strategy, data)))
        sizes = model._accum_size
        limit = sizes.limit
        while True:
            size = sizes.to_try(rows)
            snapshot = replicas.Snapshot(strategy, assigned_variables(model))
            (logs, smaller), failure = catching(attempt, data, size)
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
            sizes.limit = smaller
        _, failure = catching(rehearse)
        if failed_anywhere(strategy, failure is not None):
            snapshot.restore()
            raise does_not_fit("The optimizer's update", failure)
        # An update works in place where nobody else holds on to a value.
        del snapshot
        if sizes.note_fit(replicas.least_of_all(strategy, size)):
            model.test_function = model.predict_function = None
        return finish(model._known_sums(), logs)

    return step


def make_attempt(model, traced):
    """Returns a function that adds a batch to the buffers, in pieces of a size.

    It returns the logs, and None; or None, and a smaller size, 0 if there is
    none, where it is known not to have the memory. If it finds that out on the
    way it raises, and variables may hold anything.
    """
    strategy = model.distribute_strategy
    add_all = training.make_adding_function(model, traced)
    forecasts, allowed, reserve = {}, {}, forecast.Reserve()

    def add(data, size):
        return training.first_replica(add_all(data, size), strategy)

    @functools.cache
    def add_by(size):
        # The steps are functions of their own, and not traced again.
        by_size = functools.partial(add, size=size)
        if model.run_eagerly:
            return by_size
        return programs.in_graph(by_size, reduce_retracing=True)

    def attempt(data, size):
        shapes = shapes_of(strategy, data)
        # What was found to have room is not asked for again.
        if size > most_allowed(allowed, shapes):
            if shapes not in forecasts:
                forecasts[shapes] = make_forecast(
                    model, add_all, add_by, reserve
                )
            if forecasts[shapes] is not None:
                allowed[shapes] = forecasts[shapes].most_rows(
                    data, size, forecast.MARGIN + 2 * bytes_of(strategy, data)
                )
                if forecast.address_limit() is None:
                    # Nothing ends the process, and memory may be had by
                    # swapping, or be free again.
                    allowed[shapes] = max(1, allowed[shapes])
                if allowed[shapes] < size:
                    return None, allowed[shapes]
        return add_by(size)(data), None

    return attempt


def make_forecast(model, add_all, add_by, reserve):
    """Returns a `Forecast` of what steps need, or None where none is needed."""
    strategy = model.distribute_strategy
    if not replicas.on_cpu(model._gradient_accumulator().weight):
        return None
    if forecast.free_bytes() == forecast.UNKNOWN:
        # Steps on trial would cost time, and be compared with nothing.
        return None
    if model.jit_compile and not model.run_eagerly:
        return forecast.Planned(add_all.planned_bytes, reserve)

    def few(data, rows):
        return microbatching.first_of(microbatching.as_tensors(data), rows)

    def count(data, rows):
        snapshot = replicas.Snapshot(strategy, assigned_variables(model))
        try:
            # Two micro-batches: the steps for both kinds are then traced,
            # while there is room for that.
            take = programs.with_loop(model, few)
            part = programs.in_graph(take)(data, 2 * rows)
            return forecast.counted_bytes(add_by(rows), part)
        except ValueError:
            # TensorFlow counts where it uses oneDNN, and not elsewhere.
            return 0
        finally:
            snapshot.restore()

    return forecast.Counted(count, reserve)


def make_rehearsal(model):
    """Returns a function that computes what an update would assign, once.

    An update that is not compiled assigns some variables before the memory for
    others is asked for. If there was enough to compute all of them, there is
    enough for the update. XLA asks for everything first.
    """
    strategy = model.distribute_strategy

    def rehearse():
        accumulator = model._gradient_accumulator()
        gradients = accumulator.mean(accumulator.sums())
        pairs = zip(gradients, accumulator.variables, strict=True)
        with rehearsal.computing_assignments(), model._updating_own_copies():
            model.optimizer.apply_gradients(pairs)

    def run():
        nonlocal is_done
        if not is_done:
            function(model._known_sums())
        is_done = True

    is_done = model.jit_compile or replicas.on_tpu(strategy)
    function = programs.in_graph(lambda known: strategy.run(rehearse))
    return run


def assigned_variables(model):
    """What steps assign, besides the buffers, which each window starts anew."""
    trained = {id(variable) for variable in model.trainable_weights}
    variables = [
        variable
        for variable in [
            *model.variables,
            *model.metrics_variables,
            *compat.global_seed_state(),
        ]
        if id(variable) not in trained
    ]
    windows = [tracker.window for tracker in model._window_trackers()]
    if model._accum_moments is not None:
        windows += model._accum_moments.states
    if model._accum_nonfinite is not None:
        windows += model._accum_nonfinite.variables
    return [variable.value for variable in variables] + windows


def parts_of(strategy, data):
    """All tensors of a batch, of each of this worker's replicas."""
    return [
        part
        for leaf in tf.nest.flatten(data)
        if leaf is not None
        for part in strategy.experimental_local_results(leaf)
    ]


def shapes_of(strategy, data):
    """What a step's memory follows from, besides the number of rows."""
    return tuple(
        tuple(part.shape[1:].as_list()) for part in parts_of(strategy, data)
    )


def most_allowed(allowed, shapes):
    """The most rows allowed of batches whose rows are no shorter than these."""

    def are_shorter(others):
        return len(shapes) == len(others) and all(
            len(shape) == len(other)
            and all(
                a is not None and a <= b
                for a, b in zip(shape, other, strict=True)
            )
            for shape, other in zip(shapes, others, strict=True)
        )

    return max((n for s, n in allowed.items() if are_shorter(s)), default=0)


def bytes_of(strategy, data):
    """Bytes of a batch, on all of this worker's replicas."""
    return sum(
        tensor.dtype.size * tensor.shape.num_elements()
        for part in parts_of(strategy, data)
        for tensor in tf.nest.flatten(part, expand_composites=True)
    )


def failed_anywhere(strategy, has_failed):
    """Whether anything has failed on any worker."""
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
        # Not the error itself, which would keep alive what it passed by.
        said = str(error).partition("\n")[0]
        return (None, None), said or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the process, had not enough memory."""
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        return True
    # Some of CUDA's libraries have errors of other kinds for it.
    return bool(re.search(r"(?i)out of memory|\bOOM\b", str(error)))


def does_not_fit(what, failure):
    """The error to raise when no smaller size would help."""
    return tf.errors.ResourceExhaustedError(
        None,
        None,
        f"{what} does not fit in the memory of the device, and "
        '`microbatch_size="auto"` can do no more. The model is as it was '
        "before this batch. Make the model, its rows or the optimizer's state "
        f"smaller. Received: {failure or 'less memory than is needed'}",
    )
