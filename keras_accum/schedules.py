"""Schedules for `accum_steps`: a batch that grows, or shrinks, in training.

Each is a table, made once, of the updates from which each value on holds. So a
call is a search in it, whose answer depends on nothing but the updates so far.

References:
    - [Smith et al., 2018](https://arxiv.org/abs/1711.00489): Don't Decay the
        Learning Rate, Increase the Batch Size.
    - Megatron-LM: `--rampup-batch-size` and `--step-batch-size-schedule`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

import keras

from keras_accum.noise_schedule import NoiseScale
from keras_accum.schedule_table import Schedule
from keras_accum.schedule_table import Unit
from keras_accum.schedule_table import check_int
from keras_accum.schedule_table import check_ints
from keras_accum.schedule_table import check_unit
from keras_accum.schedule_table import starts_in_updates
from keras_accum.seesaw import Seesaw

__all__ = ["LinearRamp", "NoiseScale", "PiecewiseConstant", "Seesaw", "parse"]

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
PAIR = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?):([1-9][0-9]*)")


def __dir__() -> list[str]:
    """Lists the API, and not what makes it."""
    return __all__


def in_updates(config, boundaries, values):
    """Returns the boundaries, whatever their unit is, in updates."""
    if config["unit"] == "updates":
        return boundaries
    return starts_in_updates(boundaries, values, config["microbatch"])


def ramp_boundaries(initial: int, final: int, duration: int) -> list[int]:
    """Returns where a line from 0 to `duration` reaches each whole number.

    These are the first integers t at which
    `initial + (final - initial) * t // duration` is the next number.
    """
    levels = abs(final - initial)
    if final > initial:
        return [-(-i * duration // levels) for i in range(1, levels + 1)]
    # Rounded down, a falling line leaves a number as soon as it is below it.
    return [i * duration // levels + 1 for i in range(levels)]


@keras.saving.register_keras_serializable("keras_accum")
class PiecewiseConstant(Schedule):
    """Constants, each from its boundary on.

    As ordinary code:

    ```python
    for boundary, value in zip(boundaries, values[1:]):
        if seen >= boundary:  # updates, samples or tokens so far
            k = value
    ```

    `keras.optimizers.schedules.PiecewiseConstantDecay` has `>` there: at the
    boundary itself it gives the old value still, and this one the new.

    Samples and tokens are counted from the schedule itself, `k * microbatch`
    for each update so far. So the count survives a restart with nothing saved
    but the optimizer's `iterations`. Windows that an epoch's end cuts short,
    and micro-batches that are not full, count as whole ones; what
    `partial_window="drop"` forgets is not counted. A boundary within a window
    holds from the next one on.

    Args:
        boundaries: Where each further value begins, in `unit`; increasing
            positive ints.
        values: Micro-batches per window, positive ints; one more than
            boundaries.
        unit: What the boundaries count: `"updates"`, `"samples"` or
            `"tokens"`.
        microbatch: Samples or tokens, as `unit` says, that one micro-batch
            has over all replicas together. Left out with `"updates"`.

    Raises:
        TypeError: If a number is no integer, or `boundaries` or `values` is no
            sequence.
        ValueError: If a number is less than 1, `boundaries` do not increase,
            `values` are not one more, `unit` is unknown, or `microbatch` comes
            with `unit="updates"`.

    Example:

    ```python
    # 4 times the batch, where one would divide the learning rate by 4.
    accum_steps = schedules.PiecewiseConstant([500, 2000], [1, 4, 16])
    ```
    """

    def __init__(
        self,
        boundaries: Sequence[int],
        values: Sequence[int],
        unit: Unit = "updates",
        microbatch: int = 1,
    ) -> None:
        boundaries = check_ints("boundaries", boundaries)
        values = check_ints("values", values)
        check_boundaries(boundaries, values)
        config = {"boundaries": boundaries, "values": values}
        config |= check_unit(unit, microbatch)
        super().__init__(config, in_updates(config, boundaries, values), values)


@keras.saving.register_keras_serializable("keras_accum")
class LinearRamp(Schedule):
    """A line from `initial` to `final`, and then `final`.

    As ordinary code:

    ```python
    seen = min(seen, duration)  # updates, samples or tokens so far
    k = initial + (final - initial) * seen // duration
    ```

    It is rounded down to whole micro-batches, and may fall. Samples and tokens
    are counted as in `PiecewiseConstant`. Megatron-LM's `--rampup-batch-size`
    is this with `unit="samples"`, in steps of one micro-batch.

    Args:
        initial: Micro-batches in the first window; a positive int.
        final: Micro-batches per window from `duration` on; a positive int.
        duration: Length of the ramp, in `unit`; a positive int.
        unit: What `duration` counts: `"updates"`, `"samples"` or `"tokens"`.
        microbatch: As for `PiecewiseConstant`.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is less than 1, `unit` is unknown, or
            `microbatch` comes with `unit="updates"`.

    Example:

    ```python
    # From 32 to 256 samples per update, in the first 100,000 samples.
    accum_steps = schedules.LinearRamp(
        1, 8, 100_000, unit="samples", microbatch=32
    )
    ```
    """

    def __init__(
        self,
        initial: int,
        final: int,
        duration: int,
        unit: Unit = "updates",
        microbatch: int = 1,
    ) -> None:
        ramp = {
            "initial": check_int("initial", initial),
            "final": check_int("final", final),
            "duration": check_int("duration", duration),
        }
        step = 1 if initial < final else -1
        values = range(ramp["initial"], ramp["final"] + step, step)
        config = ramp | check_unit(unit, microbatch)
        boundaries = ramp_boundaries(**ramp)
        super().__init__(config, in_updates(config, boundaries, values), values)


def parse(
    text: str, unit: Unit = "updates", microbatch: int = 1
) -> PiecewiseConstant:
    """Reads a schedule from a flag, as `"0:1 500:4 2000:16"`.

    It is written as Megatron-LM's `--step-batch-size-schedule`, but has
    micro-batches per window where that has the batch size.

    Args:
        text: Pairs `start:k`. Starts may have a suffix: K, M, B and T stand
            for 10 to the power of 3, 6, 9 and 12.
        unit: As for `PiecewiseConstant`.
        microbatch: As for `PiecewiseConstant`.

    Raises:
        TypeError: If `text` is no string.
        ValueError: If `text` is not made of such pairs, or its starts do not
            begin with 0 and increase.

    Example:

    ```python
    accum_steps = schedules.parse("0:1 1.5M:4", "tokens", microbatch=8192)
    ```
    """
    if not isinstance(text, str):
        raise TypeError(
            '`text` must be a string, as "0:1 500:4". '
            f"Received: text={text!r} (of type {type(text).__name__})"
        )
    pairs = [PAIR.fullmatch(pair) for pair in text.split()]
    starts = [Fraction(pair[1]) * SUFFIXES[pair[2]] for pair in pairs if pair]
    if (
        not all(pairs)
        or any(start.denominator != 1 for start in starts)
        or starts[:1] != [0]
        or not increase(starts)
    ):
        raise ValueError(
            "`text` must be pairs of a start and a positive integer, and the "
            "starts whole numbers that begin with 0 and increase. Received: "
            f'text={text!r}. Write it as "0:1 500:4 1.5M:16".'
        )
    return PiecewiseConstant(
        [int(start) for start in starts[1:]],
        [int(pair[3]) for pair in pairs],
        unit,
        microbatch,
    )


def increase(numbers):
    """Returns whether each number is larger than the one before."""
    return all(a < b for a, b in zip(numbers, numbers[1:], strict=False))


def check_boundaries(boundaries, values):
    """Raises unless the boundaries increase, and there is one value more."""
    if not increase(boundaries):
        raise ValueError(
            "`boundaries` must increase. Received: "
            f"boundaries={boundaries}. Leave out a value that never holds."
        )
    if len(values) != len(boundaries) + 1:
        raise ValueError(
            "`values` must have one entry more than `boundaries`, since its "
            "first holds from the start. Received: "
            f"boundaries={boundaries}, values={values}"
        )
