"""What the first batch of `fit` tells of a model's losses.

Nothing is read off a type that can be measured: a function given to `compile`
may be a mean, a sum, or one ratio over the batch.
"""

import functools

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_accum import compat
from keras_accum import coupling
from keras_accum import replicas
from keras_accum import rows as row_counts
from keras_accum import sample as samples
from keras_accum import weighting
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from keras_accum.microbatch import Microbatch
from keras_accum.sample import Sample
from keras_accum.steps import forward

# Most rows that are looked at.
ROWS = 16
# Most entries of the outputs, but for two rows.
ENTRIES = 2**22


def measure_losses(accumulation, data) -> None:
    """Finds out what the losses are; warns of what cannot be exact.

    Args:
        accumulation: What the model accumulates in.
        data: A batch, in cross-replica context.
    """
    model, losses = accumulation.model, accumulation.losses
    losses.findings = found = find(accumulation, data)
    if losses.use_whole_batch():
        # Both passes draw from it, and it cannot be made within them.
        with model.distribute_strategy.scope():
            compat.global_seed_state()
    elif found.couples_rows and accumulation.size.value is None:
        names = ", ".join(f"`{name}`" for name in found.coupled_names(model))
        losses.warn_once(
            "The loss of a batch is not the mean of what its micro-batches "
            f"give: {names}. `accum_steps` is not exact for it. Use "
            "`microbatch_size`, which is. If it is a mean over a part of the "
            "entries, overriding `microbatch_weight` with their number makes "
            "it exact as well."
        )


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
    kinds = [None, *Kind]

    def first(value):
        return replicas.values_of_all(strategy, value)[0]

    compiled = [kinds.index(kind) for kind in findings.compiled]
    count = first(len(compiled))
    compiled += [0] * count
    undivided = [*map(int, findings.undivided)] + [0] * count
    return Findings(
        tuple(kinds[first(code)] for code in compiled[:count]),
        tuple(bool(first(code)) for code in undivided[:count]),
        kinds[first(kinds.index(findings.compute_loss))],
        bool(first(int(findings.adds_losses))),
    )


def find_in(accumulation, data) -> Findings:
    """Measures the losses of a model on some rows of a replica's batch."""
    model = accumulation.model
    data = row_counts.as_tensors(data)
    rows = rows_of(data)
    if rows is None:
        return Findings()
    find_of = of_compiled_losses
    if compat.has_custom_compute_loss(model) or accumulation.is_custom(
        "microbatch_weight"
    ):
        find_of = of_total
    try:
        return find_of(accumulation, some_rows(accumulation, data, ROWS))
    except Exception:  # noqa: BLE001
        # It may be written for as many rows as there are, and no less.
        return find_of(accumulation, some_rows(accumulation, data, rows))


def some_rows(accumulation, data, most: int) -> Sample:
    """Returns some rows of a batch and what the model makes of them.

    Args:
        accumulation: What the model accumulates in.
        data: The batch.
        most: How many rows.

    Raises:
        ValueError: If outputs have not the batch's rows along the first axis.
    """
    model, size = accumulation.model, accumulation.size
    most = min(most, rows_of(data))
    # One row, where it is yet to be found out how many fit.
    step = 1 if size.is_auto else size.rows or most
    outputs, end = [], 0
    while end < most:
        start, end = end, min(most, end + step)
        part = row_counts.take(data, start, end)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(part)
        outputs.append(outputs_of(model, x))
        entries = sum(int(tf.size(leaf)) for leaf in tf.nest.flatten(outputs))
        if end > 1 and entries > ENTRIES:
            break
    y_pred = outputs[0]
    for more in outputs[1:]:
        y_pred = samples.join_all(y_pred, more)
    if rows_of(y_pred) != end:
        raise ValueError("Outputs must have the rows of the batch.")
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        row_counts.take(data, 0, end)
    )
    return Sample(x, y, y_pred, sample_weight)


def rows_of(data) -> int | None:
    """Returns the rows of a batch; None if its tensors have not the same."""
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    if not all(map(row_counts.has_first_axis, leaves)):
        return None
    counts = {int(row_counts.count_of(leaf)) for leaf in leaves}
    return counts.pop() if len(counts) == 1 else None


def outputs_of(model, x):
    """Returns a model's outputs, in single precision where they are in half."""
    if not model.built:
        forward(model, x, training=False)
    with keras.StatelessScope(collect_losses=True):
        y_pred = forward(model, x, training=False)

    def widened(leaf):
        # Without the logits that Keras attaches: those are of other rows.
        leaf = tf.identity(leaf)
        if leaf.dtype in (tf.float16, tf.bfloat16):
            leaf = tf.cast(leaf, tf.float32)
        return leaf

    wide = keras.tree.map_structure(widened, y_pred)
    samples.copy_masks(y_pred, wide, lambda mask: mask)
    return wide


def of_compiled_losses(accumulation, sample: Sample) -> Findings:
    """Measures each of the losses given to `compile`."""
    model = accumulation.model
    compiled = compat.compiled_loss(model)
    if compiled is None:
        return Findings()
    entries = entries_of(compiled, sample)
    kinds = [kind_of_entry(*entry) for entry in entries]
    is_replicated = replicas.has_several(model.distribute_strategy)
    undivided = [
        is_replicated
        and kind not in (None, Kind.SUM)
        and not is_divided(*entry)
        for kind, entry in zip(kinds, entries, strict=True)
    ]
    return Findings(tuple(kinds), tuple(undivided))


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


def is_divided(loss, y, y_pred, sample_weight) -> bool:
    """Returns whether Keras divides a loss by the number of replicas."""
    value = loss(y, y_pred, sample_weight)
    with compat.as_on_one_replica():
        undivided = loss(y, y_pred, sample_weight)
    return not np.allclose(value, undivided, rtol=1e-3, atol=0)


def of_total(accumulation, sample: Sample) -> Findings:
    """Measures `compute_loss`, without the losses that layers add."""
    model, asked = accumulation.model, False

    def loss(part):
        nonlocal asked
        batch = (part.x, part.y, part.y_pred, part.sample_weight)
        with Microbatch(model, first=True) as microbatch:
            microbatch.hides_losses = True
            value = compat.compute_loss(model, *batch, training=True)
        asked |= microbatch.asked_for_losses
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
    with keras.StatelessScope():
        kind = coupling.kind_of(loss, weights, sample)
    return Findings(compute_loss=kind, adds_losses=asked)
