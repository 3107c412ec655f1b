"""What the first batch of `fit` tells of a model's losses.

Nothing is read off a type that can be measured: a function given to `compile`
may be a mean, a sum, or one ratio over the batch.
"""

import dataclasses
import functools

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_accum import compat
from keras_accum import coupling
from keras_accum import inner
from keras_accum import programs
from keras_accum import replicas
from keras_accum import rows as row_counts
from keras_accum import sample as samples
from keras_accum import trial
from keras_accum import warned
from keras_accum import weighting
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from keras_accum.microbatch import Microbatch
from keras_accum.sample import Sample
from keras_accum.steps import forward
from keras_accum.whole_loss import seen_by_loss
from keras_accum.whole_loss import widened

# Most rows that are looked at.
ROWS = 16
# How many to look at where that may be too many.
FEW = 3
# Most entries of the outputs to look at, but for three rows.
ENTRIES = 2**18


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
    if found.coupled_layers():
        losses.warn_once(warned.coupled_layers(found.coupled_layers()))
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
        [replicas.list_of_first(strategy, codes) for codes in findings.codes()]
    )
    return dataclasses.replace(found, added_by=findings.added_by)


def find_in(accumulation, data) -> Findings:
    """Measures the losses of a model on some rows of a replica's batch."""
    model = accumulation.model
    data = row_counts.as_tensors(data)
    rows = rows_of(data)
    # In half precision, rounding would be taken for a difference.
    if rows is None or keras.config.floatx() not in ("float32", "float64"):
        return Findings()
    find_of = of_compiled_losses
    if compat.has_custom_compute_loss(model) or accumulation.is_custom(
        "microbatch_weight"
    ):
        find_of = of_total
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    if not model.built:
        compat.build_by(model, x)
    # Few rows, where it is yet to be found out how many fit.
    size = FEW if accumulation.size.is_auto else accumulation.size.rows
    size = None if size is None else max(size, FEW)

    def look(most):
        sample, whole = some_rows(model, data, most, size)
        with trial.drawing_alike():
            return find_of(accumulation, sample), whole

    with trial.keeping_random_states():
        try:
            found, whole = look(min(ROWS, rows))
        except Exception:  # noqa: BLE001
            # It may be written for as many rows as there are, and no less.
            found, whole = look(rows)
        try:
            found = inner.with_inner_state(found, model, x, whole)
        except Exception as error:  # noqa: BLE001
            # It may take as many rows as there are, and no less.
            logging.debug("Nothing was found out of the layers: %s", error)
    if found.couples_rows and not can_be_sent(model, data):
        found = dataclasses.replace(found, is_apart=False)
    return found


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


def some_rows(
    model, data, most: int, size: int | None
) -> tuple[Sample, trial.Trial]:
    """Returns some rows of a batch and what the model makes of them.

    Args:
        model: The model.
        data: The batch.
        most: How many rows.
        size: Most rows to give to the model at once; None for all.

    Returns:
        The rows, and what came of the model's first call.

    Raises:
        ValueError: If outputs have not the batch's rows along the first axis.
    """
    trials, end = [], 0
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


def of_compiled_losses(accumulation, sample: Sample) -> Findings:
    """Measures each of the losses given to `compile`."""
    model = accumulation.model
    compiled = compat.compiled_loss(model)
    if compiled is None:
        return Findings()
    entries = entries_of(compiled, sample)
    # Losses may have variables of their own, such as random states.
    with keras.StatelessScope():
        kinds = [kind_of_entry(*entry) for entry in entries]
        is_replicated = replicas.has_several(model.distribute_strategy)
        undivided = [
            is_replicated
            and kind not in (None, Kind.SUM)
            and not is_divided(*entry)
            for kind, entry in zip(kinds, entries, strict=True)
        ]
        is_apart = not any(
            kind is Kind.COUPLED and looks_at_variables(entry)
            for kind, entry in zip(kinds, entries, strict=True)
        )
    return Findings(tuple(kinds), tuple(undivided), is_apart=is_apart)


def entries_of(compiled, sample: Sample) -> list[tuple]:
    """Returns the losses given to `compile`, each with what it sees."""
    entries = []
    batch = (sample.y, sample.y_pred, sample.sample_weight)
    if not compat.is_built(compiled):
        compat.build_compiled_losses(compiled, *batch)
    compat.map_compiled_losses(
        compiled, lambda *entry: entries.append(entry), *batch
    )
    return entries


def kind_of_entry(loss, y, y_pred, sample_weight) -> Kind | None:
    """Measures one of the losses given to `compile`."""

    def denominator(part):
        return weighting.loss_denominator(
            loss, part.y, part.y_pred, part.sample_weight, part.rows
        )

    sample = Sample(None, y, y_pred, sample_weight)
    try:
        likely = denominator(sample)
    except Exception:  # noqa: BLE001
        # It cannot be computed of these rows alone.
        likely = None
    weights = {Kind.ROW_MEAN: lambda part: part.rows, Kind.SUM: lambda _: 1.0}
    if likely is not None and likely.source is not weighting.GUESS:
        mean = {Kind.MEAN: lambda part: denominator(part).value}
        weights = mean | weights

    return coupling.kind_of(
        lambda part: loss(part.y, part.y_pred, part.sample_weight),
        weights,
        sample,
    )


def looks_at_variables(entry) -> bool:
    """Returns whether a loss has gradients by more than its arguments."""
    loss, *batch = entry
    with tf.GradientTape() as tape:
        loss(*batch)
    return bool(tape.watched_variables())


def is_divided(loss, y, y_pred, sample_weight) -> bool:
    """Returns whether Keras divides a loss by the number of replicas."""
    value = loss(y, y_pred, sample_weight)
    with compat.as_on_one_replica():
        undivided = loss(y, y_pred, sample_weight)
    return not np.allclose(value, undivided, rtol=1e-3, atol=0)


def of_total(accumulation, sample: Sample) -> Findings:
    """Measures `compute_loss`, without the losses that layers add."""
    model, asked = accumulation.model, False
    apart = is_apart(model, sample)

    def loss(part, shown=()):
        nonlocal asked
        if not apart:
            # What is left in the model is then that of these rows.
            trial.called(model, part.x, [])
        value, looks = compute_alone(
            model, part.x, part.y, part.y_pred, part.sample_weight, shown
        )
        asked |= looks
        return value

    is_ours = not accumulation.is_custom("microbatch_weight")

    def weight(part):
        if not is_ours:
            return model.microbatch_weight(
                part.x, part.y, part.y_pred, part.sample_weight
            )
        compiled = compat.compiled_loss(model)
        if compiled is None:
            return None
        return weighting.total_weight(
            [
                weighting.loss_denominator(*entry, part.rows)
                for entry in entries_of(compiled, part)
            ]
        )

    # What the losses given to `compile` say, or an override.
    weights = {}
    try:
        if weight(sample) is not None:
            weights[Kind.MEAN] = weight
    except Exception:  # noqa: BLE001
        # An override may take labels that no loss of `compile` would.
        pass
    if is_ours:
        weights[Kind.ROW_MEAN] = lambda part: part.rows
    if Kind.MEAN not in weights or Kind.ROW_MEAN in weights:
        weights[Kind.SUM] = lambda _: 1.0
    try:
        with keras.StatelessScope():
            kind = coupling.kind_of(loss, weights, sample)
            if kind is Kind.COUPLED and apart:
                apart = adds_up(loss, sample, asked)
    except Exception:  # noqa: BLE001
        # It may look at what the model has left of all rows.
        kind = None
    return Findings(compute_loss=kind, adds_losses=asked, is_apart=apart)


def compute_alone(
    model, x, y, y_pred, sample_weight, shown=()
) -> tuple[tf.Tensor, bool]:
    """Calls `compute_loss` apart from the model's call.

    Args:
        model: The model.
        x: As for `compute_loss`.
        y: As for `compute_loss`.
        y_pred: As for `compute_loss`.
        sample_weight: As for `compute_loss`.
        shown: What `model.losses` is to seem.

    Returns:
        The loss, and whether `model.losses` was looked at.
    """
    with Microbatch(model, first=True) as microbatch:
        microbatch.shown_losses = list(shown)
        loss = compat.compute_loss(
            model, x, y, y_pred, sample_weight, training=True
        )
    return loss, microbatch.asked_for_losses


def adds_up(loss, sample: Sample, asked: bool) -> bool:
    """Returns whether `compute_loss` adds what layers add, and no more.

    Args:
        loss: It, as a function of a sample and of `model.losses`.
        sample: Some rows.
        asked: Whether it looks at `model.losses`.
    """
    with tf.GradientTape() as tape:
        value = loss(sample)
    if tape.watched_variables():
        # Weights have gradients by other ways than the outputs.
        return False
    if not asked:
        return True
    with compat.as_on_one_replica():
        zero, one = (
            tf.reduce_sum(loss(sample, [tf.constant(shown, value.dtype)]))
            for shown in (0.0, 1.0)
        )
    return abs(float(one - zero) - 1) < 1e-3


def is_apart(model, sample: Sample) -> bool:
    """Returns whether `compute_loss` needs nothing but its arguments.

    It may look at what `call` has left in the model.
    """
    outputs = programs.in_graph(lambda x: forward(model, x, training=True))

    def loss(*batch):
        value, _ = compute_alone(model, *batch)
        return value

    batch = (sample.x, sample.y, sample.y_pred, sample.sample_weight)
    try:
        with keras.StatelessScope(collect_losses=True):
            outputs.get_concrete_function(sample.x)
            traced = programs.in_graph(loss).get_concrete_function(*batch)
    except Exception:  # noqa: BLE001
        return False
    # A tensor of the model's call is of another graph.
    return not any(map(tf.is_symbolic_tensor, traced.captured_inputs))
