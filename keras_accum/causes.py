"""What differences between micro-batches and the batch at once come from."""

from collections.abc import Callable

from keras_accum.dry_run import Result

# What a difference may come from, and what to do.
BY_DESIGN = (
    "BatchNormalization normalizes by each micro-batch",
    "this is by design; LayerNormalization and GroupNormalization are exact",
)
COUPLED = (
    "the loss couples rows: {}",
    "use `microbatch_size`; for a mean over a part of the entries, override "
    "`microbatch_weight`",
)
COUPLED_LAYER = (
    "a layer adds a loss that couples rows: {}",
    "add a mean over the rows, or a sum; or make what it is computed of an "
    "output, give the loss to `compile`, and use `microbatch_size`",
)
DRIVEN = (
    "a layer assigns what follows from the data: {}",
    "assign it in an override of `update_step`",
)
MIXED_ROWS = (
    "outputs of a row depend on the rows that are with it",
    "return what is compared, one entry for each row, let the loss compare, "
    "and use `microbatch_size`",
)
SEVERAL_WEIGHTS = (
    "the losses have denominators of their own",
    "leave `compute_loss` and `microbatch_weight` to Keras",
)
OWN_WEIGHT = (
    "the `weight` that `train_step` gives to `accumulate`",
    "give {}",
)
OWN_LOSS = (
    "the loss in `train_step` is neither a mean over the rows nor a sum",
    "give its denominator as `weight`; if rows depend on each other, there is "
    "none",
)
OWN_STATE = (
    "`train_step` assigns it in each micro-batch",
    "assign it in an override of `update_step`",
)
UNKNOWN = ("not found", "take layers away until it is gone")


def cause_of(model, parts: Result) -> tuple[str, str]:
    """Returns what a difference comes from, and what to do about it."""
    found, uses_parts = parts.findings, model.microbatch_size is None

    def said(cause, names):
        text, way_out = cause
        quoted = ", ".join(f"`{name}`" for name in names)
        return text.format(quoted), way_out

    if found.mixes_rows and not found.driven:
        return MIXED_ROWS
    if found.couples_rows and uses_parts:
        return said(COUPLED, found.coupled_names(model))
    if found.coupled_layers():
        return said(COUPLED_LAYER, found.coupled_layers())
    if found.driven:
        return said(DRIVEN, found.driven_paths(model))
    if parts.needs_denominators and uses_parts:
        return SEVERAL_WEIGHTS
    return UNKNOWN


def assigns_itself(model, parts: Result) -> bool:
    """Returns whether a `train_step` of the user's, and no layer, assigns."""
    if model._accumulation.overrides.step("train_step") is None:
        return False
    return parts.findings is None or not parts.findings.driven


def own_cause(is_exact: Callable[[Callable], bool]) -> tuple[str, str]:
    """Returns what a difference of a model's own `train_step` comes from.

    Args:
        is_exact: Whether gradients agree if a number of rows counts as a
            function says.
    """
    for weight_of, said in (
        (lambda rows: float(rows), "the number of rows: the loss is a mean"),
        (lambda rows: None, "None: the loss is a sum"),
    ):
        if is_exact(weight_of):
            cause, way_out = OWN_WEIGHT
            return cause, way_out.format(said)
    return OWN_LOSS
