"""What is said of losses and layers that are not exact, and what is refused."""

import difflib
from collections.abc import Iterable
from collections.abc import Sequence

ONE_WEIGHT = (
    "One weight per micro-batch may not be exact for this model: the masks or "
    "reductions of its losses differ, or a loss returns a scalar that its "
    "`reduction` or the sample weights do not fit. Use `microbatch_size`, or "
    "override `microbatch_weight`."
)
REGULARIZERS = (
    "`microbatch_weight` does not agree with the `reduction` of the loss given "
    "to `compile` on whether it is a sum: weight regularizers may count more "
    "than once in this window."
)

NO_NOISE_SCALE = (
    "The gradient noise scale is not defined for a loss that couples the rows "
    "of a batch: it is no mean of what single rows give. It stays unknown, and "
    "a schedule that follows it at its smallest window."
)

MIXED_ROWS = (
    "An output of the model depends, for each row, on the other rows of the "
    "batch. A micro-batch has fewer, so that its outputs are not those of the "
    "batch at once. Where a loss compares rows, let the model return what is "
    "compared, one entry for each row, and let the loss compare: it is exact "
    "with `microbatch_size`."
)


def coupled(names: Sequence[str]) -> str:
    """Returns what to say of losses that couple rows."""
    return (
        "The loss of a batch is not the mean of what its micro-batches give: "
        f"{quoted(names)}. One weight per micro-batch is not exact for it. Use "
        "`microbatch_size`, which is exact without a `train_step` of your own. "
        "If it is a mean over a part of the entries, overriding "
        "`microbatch_weight` with their number makes it exact as well."
    )


def coupled_layers(names: Sequence[str]) -> str:
    """Returns what to say of layers that add a loss that couples rows."""
    return (
        "A layer adds a loss that is neither a mean over the rows nor a sum: "
        f"{quoted(names)}. The mean of what its micro-batches give is used, "
        "which is not what the batch at once would give."
    )


def unmeasured_layers(names: Sequence[str]) -> str:
    """Returns what to say of added losses that nobody knows how to cut."""
    return (
        f"A layer adds a loss: {quoted(names)}. Inputs and labels have "
        "different numbers of rows, so it cannot be measured how the loss "
        "counts. It is taken for a mean over the rows of the labels. If it is "
        "no mean, override `microbatch_weight`, or make it an output with a "
        "loss in `compile`."
    )


def driven(paths: Sequence[str]) -> str:
    """Returns what to say of variables that layers assign from data."""
    return (
        f"A layer assigns what follows from the data: {quoted(paths)}. It does "
        "so in each micro-batch, where the batch at once would do it once. If "
        "it belongs to the update, override `update_step`."
    )


def assigned(paths: Sequence[str]) -> str:
    """Returns what to say of variables that a `train_step` assigns."""
    some, more = paths[:3], len(paths) - 3
    others = f" and {more} more" if more > 0 else ""
    return (
        f"`train_step`, or a layer that it calls, assigns {quoted(some)}"
        f"{others}. It does so in each micro-batch, where the batch at once "
        "would do it once. If it belongs to the update, as a moving average of "
        "the weights does, assign it in an override of `update_step`."
    )


def quoted(names: Sequence[str]) -> str:
    """Returns names in backticks, with commas between."""
    return ", ".join(f"`{name}`" for name in names)


def check_policy_of_share(nonfinite: str) -> None:
    """Raises a `ValueError` if a micro-batch may be skipped."""
    if nonfinite == "skip_microbatch":
        raise ValueError(
            '`nonfinite` must not be "skip_microbatch" with '
            "`microbatch_size` where the losses of a model couple the rows of "
            "a batch, or have denominators that differ, by their masks or "
            "reductions. They are known before the gradients are, and would "
            'count what is skipped. Use "skip_window", or `accum_steps`.'
        )


def did_you_mean(names: Iterable[str], known: Sequence[str]) -> str:
    """Returns a sentence on names that are nearly known, or "" if none is.

    Args:
        names: Names of arguments that nobody knows.
        known: Those that there are.
    """
    similar = (difflib.get_close_matches(name, known, 1) for name in names)
    meant = ", ".join(f"`{name}`" for match in similar for name in match)
    return f" Did you mean {meant}?" if meant else ""
