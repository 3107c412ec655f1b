"""Computes a batch again, to find out what of it is not finite.

It is computed eagerly, as in the host's own loop, and changes nothing.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas
from keras_accum import restoring
from keras_accum import rows as row_counts
from keras_accum import steps
from keras_accum import trial
from keras_accum.first_batch import rows_of
from keras_accum.gradients import values_of
from keras_accum.nonfinite_cause import Cause
from keras_accum.nonfinite_cause import cause_in
from keras_accum.nonfinite_report import NonfiniteReport
from keras_accum.recorded_calls import Record
from keras_accum.recorded_calls import Seen
from keras_accum.recorded_calls import finite_entries
from keras_accum.recorded_calls import is_looked_at

NOT_HELD = "its batch was not held"


def report_on(
    accumulation, candidates: list, epoch: int | None, lacks_some: bool
) -> NonfiniteReport:
    """Replays batches, and returns the report on the first that is not finite.

    Args:
        accumulation: What the model accumulates in.
        candidates: The `watch.Held` batches, in the order of training.
        epoch: Their epoch.
        lacks_some: Whether it may have been one before them.
    """
    if not candidates:
        return NonfiniteReport(epoch, None, note="it was in no batch of `fit`")
    note = "computed again, all is finite"
    for held in candidates:
        if held.data is None:
            note = NOT_HELD
            continue
        try:
            cause = find_cause(accumulation, held.data, accumulation.size.value)
        except Exception as error:  # noqa: BLE001
            # Training goes on, whatever a model makes of being called so.
            said = str(error).partition("\n")[0].rstrip(".")
            note = f"it could not be computed again, {said}"
            continue
        if cause is not None:
            return NonfiniteReport(
                epoch,
                held.batch,
                cause.rows,
                cause.layer,
                cause.stage,
                cause.note,
            )
    first, last = (
        each.batch if isinstance(each.batch, tuple) else (each.batch,) * 2
        for each in (candidates[0], candidates[-1])
    )
    if lacks_some:
        return NonfiniteReport(epoch, (0, last[1]), note=NOT_HELD)
    batch = first[0] if first[0] == last[1] else (first[0], last[1])
    return NonfiniteReport(epoch, batch, note=note)


def find_cause(accumulation, data, size: int | None) -> Cause | None:
    """Replays a batch, and returns what is not finite; None if all is.

    It changes nothing.

    Args:
        accumulation: What the model accumulates in.
        data: The batch, in cross-replica context.
        size: Most rows of a micro-batch; None for all in one.
    """
    strategy = accumulation.model.distribute_strategy
    before, batches = 0, local_batches(strategy, data)
    for local in batches:
        num_rows = rows_of(local)
        for start in range(0, num_rows or 1, size or num_rows or 1):
            part = local
            if size is not None and num_rows is not None:
                stop = min(start + size, num_rows)
                part = row_counts.take(local, start, stop)
            with strategy.scope():
                cause = find_in_microbatch(accumulation, part)
            if cause is None:
                continue
            rows = tuple(before + start + row for row in cause.rows)
            if cause.stage == "input":
                # What is in the other micro-batches is easily seen.
                rows = rows_of_inputs(batches)
            return dataclasses.replace(cause, rows=rows)
        before += num_rows or 0
    return None


def rows_of_inputs(batches: list) -> tuple[int, ...]:
    """Returns which rows of a batch are not finite.

    Args:
        batches: What `local_batches` returned.
    """
    found, before = [], 0
    for local in batches:
        seen = Seen(rows_of(local))
        seen.add(local)
        found += [before + row for row in sorted(seen.rows)]
        before += rows_of(local) or 0
    return tuple(found)


def local_batches(strategy: tf.distribute.Strategy, data) -> list:
    """Returns a batch as each of this worker's replicas has it."""
    leaves = tf.nest.flatten(data)
    local = [strategy.experimental_local_results(leaf) for leaf in leaves]
    return [
        row_counts.as_tensors(tf.nest.pack_sequence_as(data, each))
        for each in zip(*local, strict=True)
    ]


def find_in_microbatch(accumulation, data) -> Cause | None:
    """Returns what is not finite in a micro-batch; None if all is."""
    optimizer = accumulation.model.optimizer
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return replayed(accumulation, data, None)
    if cause := replayed(accumulation, data, 1.0):
        return cause
    scale = float(tf.convert_to_tensor(optimizer.dynamic_scale))
    # The update that the micro-batch was left out of may have halved it.
    for each in (scale, 2 * scale):
        if cause := replayed(accumulation, data, each):
            note = f"with the loss scale {each:g} it overflows"
            return dataclasses.replace(cause, note=note)
    return None


def replayed(accumulation, data, scale: float | None) -> Cause | None:
    """Makes the step of a micro-batch, and returns what is not finite.

    Args:
        accumulation: What the model accumulates in.
        data: The micro-batch.
        scale: What the loss is multiplied by, instead of what the optimizer
            does; None to leave it.
    """
    model = accumulation.model
    record = Record(rows_of(data))
    has_own_step = accumulation.overrides.step("train_step") is not None
    make = gradients_of_own_step if has_own_step else gradients_of
    with contextlib.ExitStack() as stack:
        stack.enter_context(trial.keeping_random_states())
        stack.enter_context(compat.drawing_through(draw, False))
        if scale is not None:
            stack.enter_context(scaling_by(model.optimizer, scale))
        gradients = make(accumulation, data, record.recording)
    bad = {
        id(variable): variable
        for variable, gradient in gradients
        if gradient is not None and not is_finite(values_of(gradient))
    }
    if not bad:
        return None
    return cause_in(record.step, data, set(bad))


def draw(draw_from: Callable, shape):
    """Draws numbers, with no state of any generator."""
    return draw_from(shape, trial.SEED)


def scaling_by(optimizer, scale: float) -> contextlib.AbstractContextManager:
    """Has an optimizer multiply losses by a number."""
    return compat.attribute(
        optimizer, "scale_loss", lambda loss: loss * tf.cast(scale, loss.dtype)
    )


def gradients_of(accumulation, data, recording: Callable) -> list[tuple]:
    """Returns pairs of a trainable variable and its gradient."""
    model = accumulation.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weights = model.trainable_weights
    unassigned = dict.fromkeys(trial.ASSIGNMENTS, trial.unassigned)
    with (
        keras.StatelessScope(collect_losses=True),
        compat.replacing_assignments(unassigned),
        tf.GradientTape() as tape,
    ):
        # Of the inputs there is no gradient otherwise.
        tape.watch([each for each in tf.nest.flatten(x) if is_looked_at(each)])
        with recording():
            y_pred = steps.forward(model, x, training=True)
        loss = compat.compute_loss(model, x, y, y_pred, sample_weight, True)
        loss = model.optimizer.scale_loss(loss)
        # Outside of replicas, the first one's copies are read.
        strategy = model.distribute_strategy
        read = [replicas.copies(strategy, each.value)[0] for each in weights]
        gradients = tape.gradient(loss, read)
    return list(zip(weights, gradients, strict=True))


def gradients_of_own_step(accumulation, data, recording: Callable) -> list:
    """Returns the pairs that a user's own `train_step` accumulates."""
    model = accumulation.model
    options = accumulation.options.replace(nonfinite="propagate")
    with restoring.unchanged(model), contextlib.ExitStack() as stack:
        made = type(accumulation)(model, options, accumulation.overrides)
        stack.enter_context(compat.attribute(model, "_accumulation", made))
        made.losses.findings = accumulation.losses.findings
        made.window["losses"].make_tracker()
        microbatch = stack.enter_context(made.microbatch(data, True))
        stack.enter_context(recording())
        steps.call_train_step(made, microbatch, data)
    variables = model.trainable_weights
    return [
        pair
        for call in microbatch.calls
        for pair in zip(
            call.variables or variables, call.gradients, strict=True
        )
    ]


def is_finite(values: tf.Tensor) -> bool:
    """Returns whether all entries of a gradient are finite."""
    return bool(tf.reduce_all(finite_entries(values)))
