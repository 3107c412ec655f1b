"""What kind of loss a model's `compute_loss` is as a whole, on some rows."""

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import coupling
from keras_accum import programs
from keras_accum import trial
from keras_accum import weighting
from keras_accum.compiled_kinds import entries_of
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from keras_accum.microbatch import Microbatch
from keras_accum.sample import Sample
from keras_accum.steps import forward


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

    is_ours = not accumulation.overrides.has("microbatch_weight")

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
