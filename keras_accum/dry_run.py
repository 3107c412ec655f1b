"""The steps of a window, made eagerly, after which everything is put back."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import each_microbatch
from keras_accum import first_batch
from keras_accum import loss_tracker
from keras_accum import programs
from keras_accum import replicas
from keras_accum import restoring
from keras_accum import rows as row_counts
from keras_accum import steps
from keras_accum.accumulation import Accumulation
from keras_accum.findings import Findings


@dataclasses.dataclass(frozen=True)
class Result:
    """What a window would have given to the optimizer.

    Attributes:
        loss: The loss; None if the model's own step does not tell.
        gradients: By the path of their variable.
        state: Values of all variables at the end, by path.
        assigned: Of those that a step assigns, or may: weights are, at most, by
            a `train_step` of the user's.
        findings: What the batch told of the losses; None if the model's own
            step says how much they count.
        needs_denominators: Whether one weight does not fit all losses.
    """

    loss: float | None
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    assigned: frozenset[str]
    findings: Findings | None
    needs_denominators: bool


def run(
    model, data, bounds: Sequence[int], weight_of: Callable | None = None
) -> Result:
    """Makes the steps of a window, and returns what came of it.

    Args:
        model: The model.
        data: The batch.
        bounds: Where its micro-batches begin, and where the last one ends.
        weight_of: How much a number of rows counts, instead of what the
            model's own `train_step` says; None to leave it.
    """
    strategy, options = model.distribute_strategy, model._accumulation.options
    options = options.replace(nonfinite="propagate")
    overrides = model._accumulation.overrides
    snapshot = replicas.Snapshot(strategy, restoring.variables_of(model))
    before = values_of(model)
    with strategy.scope():
        accumulation = Accumulation(model, options, overrides)
    with compat.attribute(model, "_accumulation", accumulation):
        tracker = accumulation.window["losses"].make_tracker()
        tracker.reset_state()
        if accumulation.losses.are_to_be_measured():
            first_batch.measure_losses(accumulation, data)
        step = functools.partial(train_on, accumulation, weight_of)
        # The whole is one step, whatever the model does with micro-batches.
        if options.microbatch_size is None or len(bounds) == 2:
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                part = row_counts.take(data, start, stop)
                programs.running(model, functools.partial(step, start == 0))(
                    part
                )
        else:
            each = each_microbatch.EachMicrobatch(accumulation, step, True)
            each((data,), max(np.diff(bounds)))
        result = result_of(accumulation, before)
    snapshot.restore()
    return result


def train_on(accumulation, weight_of, is_first, data, **known):
    """Makes a step on a micro-batch; see `run`."""
    model = accumulation.model
    with contextlib.ExitStack() as stack:
        if weight_of is not None:
            weight = weight_of(first_batch.rows_of(data))
            accumulate = functools.partial(accumulate_with, model, weight)
            stack.enter_context(
                compat.attribute(model, "accumulate", accumulate)
            )
        return steps.train_microbatch(accumulation, is_first, data, **known)


def accumulate_with(model, other, gradients, weight=1.0, optimizer=None):
    """Calls `accumulate` with another weight than the one that was given."""
    del weight
    type(model).accumulate(model, gradients, other, optimizer)


def result_of(accumulation, before: dict[str, np.ndarray]) -> Result:
    """Ends a window without an update, and returns what it gathered.

    Args:
        accumulation: What the model accumulates in.
        before: What `values_of` said before the window.
    """
    model, window = accumulation.model, accumulation.window
    strategy = model.distribute_strategy

    def end():
        sums = window.sums()
        # Each replica has seen the whole batch: they all have the same.
        updates = window["gradients"].updates(sums["gradients"])
        window["moments"].close(sums["moments"], None)
        return {
            name_in(updates, update, variable): mean
            for update in updates
            for variable, mean in zip(
                update.variables, update.gradients, strict=True
            )
            if mean is not None
        }

    gradients = {
        name: np.asarray(
            strategy.experimental_local_results(mean)[0], "float64"
        )
        for name, mean in programs.running(model, end)().items()
    }
    tracker = compat.loss_tracker(model)
    total, rows = loss_tracker.window_total(
        [replicas.copies(strategy, each)[0] for each in tracker.windows]
    )
    known = accumulation.losses
    findings = None if known.have_own_step() else known.findings
    state = values_of(model)
    weights = {each.path for each in model.trainable_variables}
    return Result(
        float(total / rows) if rows else None,
        gradients,
        state,
        frozenset(
            path
            for path, value in state.items()
            if path not in weights
            or not np.array_equal(value, before[path], equal_nan=True)
        ),
        findings,
        known.needs_denominators and not known.may_be_apart(),
    )


def values_of(model) -> dict[str, np.ndarray]:
    """Returns the values of a model's variables, but for random states."""
    skipped = {id(each) for each in compat.random_states(model)}
    return {
        variable.path: np.asarray(variable, "float64")
        for variable in model.variables
        if id(variable) not in skipped
        and tf.as_dtype(variable.dtype).is_floating
    }


def name_in(updates, update, variable) -> str:
    """Returns what to call the gradient of a variable in an update."""
    if len(updates) == 1:
        return variable.path
    return f"{variable.path}, for {update.optimizer.name}"
