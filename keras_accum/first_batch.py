"""What the first batch of `fit` tells of a model's losses.

Nothing is read off a type that can be measured: a function given to `compile`
may be a mean, a sum, or one ratio over the batch.
"""

import dataclasses
import functools

import keras
import tensorflow as tf
from absl import logging

from keras_accum import compat
from keras_accum import compiled_kinds
from keras_accum import inner
from keras_accum import replicas
from keras_accum import rows as row_counts
from keras_accum import sample as samples
from keras_accum import total_kind
from keras_accum import trial
from keras_accum import warned
from keras_accum.findings import Findings
from keras_accum.sample import Sample
from keras_accum.whole_loss import seen_by_loss
from keras_accum.whole_loss import widened

# Most rows that are looked at.
ROWS = 16
# How many to look at where that may be too many.
FEW = 3
# Most entries of the outputs to look at, but for three rows.
ENTRIES = 2**18


def look_at(accumulation, data) -> None:
    """Measures the losses on a batch, unless they are known."""
    if accumulation.losses.are_to_be_measured():
        measure_losses(accumulation, data)


def measure_losses(accumulation, data) -> None:
    """Finds out what the losses are; warns of what cannot be exact.

    Args:
        accumulation: What the model accumulates in.
        data: A batch, in cross-replica context.
    """
    model, losses = accumulation.model, accumulation.losses
    losses.findings = found = find(accumulation, data)
    repeated = [model.variables[index] for index in found.repeated]
    accumulation.window["repeated"].begin_with(repeated)
    if found.added and not found.is_cut:
        losses.warn_once(warned.unmeasured_layers(found.added_by))
    if found.coupled_layers():
        losses.warn_once(warned.coupled_layers(found.coupled_layers()))
    # They may depend on each other by what was assigned.
    if found.mixes_rows and not found.driven:
        losses.warn_once(warned.MIXED_ROWS)
    if found.driven:
        losses.warn_once(warned.driven(found.driven_paths(model)))


def find(accumulation, data) -> Findings:
    """Measures the losses of a model on some rows of a batch.

    It makes the model's variables, where they are not made yet, and changes
    nothing else. Where the model or its losses cannot be called so, nothing is
    found.

    Args:
        accumulation: What the model accumulates in.
        data: The batch, in cross-replica context.
    """
    model = accumulation.model
    strategy = model.distribute_strategy
    local = replicas.first_local(strategy, data)
    try:
        with strategy.scope():
            found = compat.optionals_to_none(
                model, functools.partial(find_in, accumulation)
            )(local)
    except Exception as error:  # noqa: BLE001
        # Training will say what is wrong, if it is.
        logging.debug("Nothing was found out of the losses: %s", error)
        found = Findings()
    if replicas.has_several_workers(strategy):
        found = of_first_worker(strategy, found)
    return found


def of_first_worker(strategy, findings: Findings) -> Findings:
    """Returns what the first worker found, so that all do the same."""
    found = Findings.from_codes(
        replicas.list_of_first(strategy, findings.codes())
    )
    return dataclasses.replace(found, added_by=findings.added_by)


def find_in(accumulation, data) -> Findings:
    """Measures the losses of a model on some rows of a replica's batch."""
    model = accumulation.model
    data = row_counts.as_tensors(data)
    rows = rows_of(data)
    # In half precision, rounding would be taken for a difference.
    if keras.config.floatx() not in ("float32", "float64"):
        return Findings()
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    if not model.built:
        compat.build_by(model, x)
    if rows is None:
        return find_in_outputs(accumulation, data)
    # Few rows, where it is yet to be found out how many fit.
    size = FEW if accumulation.size.is_auto else accumulation.size.rows
    size = None if size is None else max(size, FEW)

    def look(data):
        sample, whole = some_rows(model, data, size)
        with trial.drawing_alike():
            return of_losses(accumulation, sample), whole

    with trial.keeping_random_states():
        try:
            some = row_counts.spread(data, ROWS)
            found, whole = look(some)
        except Exception:  # noqa: BLE001
            # It may be written for as many rows as there are, and no less.
            some = data
            found, whole = look(some)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(some)
        try:
            found = inner.with_inner_state(found, model, x, whole)
            found = dataclasses.replace(
                found, mixes_rows=inner.mixes_rows(model, x, whole)
            )
        except Exception as error:  # noqa: BLE001
            # It may take as many rows as there are, and no less.
            logging.debug("Nothing was found out of the layers: %s", error)
    if found.couples_rows and not can_be_sent(model, data):
        found = dataclasses.replace(found, is_apart=False)
    return found


def find_in_outputs(accumulation, data) -> Findings:
    """Measures losses where labels have other rows than inputs.

    A batch of graphs has a row of inputs for each node, and one of labels for
    each graph. Nobody knows how to cut such inputs; outputs are as labels.
    """
    model = accumulation.model
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with trial.keeping_random_states(), trial.drawing_alike():
        whole = trial.of_whole(model, x)
        y_pred = seen_alone(whole.y_pred)
        sample = Sample(None, y, y_pred, sample_weight)
        found = Findings()
        if rows_of((y, y_pred, sample_weight)) is not None:
            found = of_losses(accumulation, sample.part(0, ROWS))
    return dataclasses.replace(
        found,
        added=(None,) * len(whole.added),
        added_by=tuple(whole.added_by),
        is_cut=False,
    )


def of_losses(accumulation, sample: Sample) -> Findings:
    """Measures the losses given to `compile`, or what overrides make of them.

    Args:
        accumulation: What the model accumulates in.
        sample: Some rows.
    """
    if compat.has_custom_compute_loss(accumulation.model):
        return total_kind.of_total(accumulation, sample)
    found = compiled_kinds.of_compiled_losses(accumulation, sample)
    if not accumulation.overrides.has("microbatch_weight"):
        return found
    total = total_kind.of_total(accumulation, sample)
    # By what Keras has divided them is not for the override to say.
    return dataclasses.replace(total, undivided=found.undivided)


def can_be_sent(model, data) -> bool:
    """Returns whether replicas can send each other what a loss looks at."""
    if not replicas.has_several(model.distribute_strategy):
        return True
    return all(
        isinstance(leaf, tf.Tensor)
        and not leaf.dtype.is_complex
        and leaf.dtype != tf.string
        for leaf in tf.nest.flatten(seen_by_loss(model, data))
        if leaf is not None
    )


def some_rows(model, data, size: int | None) -> tuple[Sample, trial.Trial]:
    """Returns some rows and what the model makes of them.

    Args:
        model: The model.
        data: The rows. Fewer are taken where outputs are large.
        size: Most rows to give to the model at once; None for all.

    Returns:
        The rows, and what came of the model's first call.

    Raises:
        ValueError: If outputs have not the batch's rows along the first axis.
    """
    trials, end, most = [], 0, rows_of(data)
    while end < most:
        start, end = end, min(most, end + (size or most))
        part = row_counts.take(data, start, end)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(part)
        trials.append(trial.of_whole(model, x))
        outputs = [each.y_pred for each in trials]
        entries = sum(int(tf.size(leaf)) for leaf in tf.nest.flatten(outputs))
        if end > 2 and entries > ENTRIES:
            break
    y_pred = functools.reduce(samples.join_all, map(seen_alone, outputs))
    if rows_of(y_pred) != end:
        raise ValueError("Outputs must have the rows of the batch.")
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        row_counts.take(data, 0, end)
    )
    sample = Sample(x, y, y_pred, sample_weight)
    if most <= ROWS:
        sample = sample.part(0, min(end, max(3, ENTRIES * end // entries)))
    return sample, trials[0]


def rows_of(data) -> int | None:
    """Returns the rows of a batch; None if its tensors have not the same."""
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    if not all(map(row_counts.has_first_axis, leaves)):
        return None
    counts = {int(row_counts.count_of(leaf)) for leaf in leaves}
    return counts.pop() if len(counts) == 1 else None


def seen_alone(y_pred):
    """Returns outputs in single precision, with their masks and no logits.

    The logits that Keras attaches are of all rows, which parts have not.
    """
    leaves = keras.tree.map_structure(widened, y_pred)
    samples.copy_masks(y_pred, leaves, lambda mask: mask)
    return leaves
