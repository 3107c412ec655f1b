"""Batches far beyond what fits, under one memory limit.

    python -m benchmarks.memory_limit

`keras.Model` trains batches of 32 rows, 64 and so on, under a limit on the
address space, until it dies of memory. From the largest that it trained on,
batches of 1, 16 and 64 times as many rows are trained three times:

* by `keras.Model` in float64 without the limit, for weights that are exact,
* by `keras.Model` without the limit,
* by `GradientAccumulationModel` with `microbatch_size`, under the limit.

Each training has a process of its own; `benchmarks.limited_training` says when
in it the limit is set. The table has its peak address space and its peak
resident memory in MiB, beyond those at that moment; the milliseconds for a row
of its fastest update; how far its weights end up from the exact ones, over how
far those moved; and its time over that of `keras.Model` without the limit.

On two busy cores, with TensorFlow 2.21.0 and Keras 3.15.1, limit 96 MiB:

                 rows  limit  address  resident  ms/row  weights / keras
    keras.Model    64     96       94        50    0.67
    keras.Model   128     96  died: ResourceExhaustedError
    keras.Model    64      -       94        50    0.69  6.8e-06
    keras_accum    64     96       56        20    0.83  6.6e-06    1.20
    keras.Model  1024      -    1,093       869    0.58  6.4e-05
    keras_accum  1024     96       56        24    0.82  8.9e-06    1.41
    keras.Model  4096      -    4,274     3,346    0.70  4.1e-04
    keras_accum  4096     96       56        21    0.96  9.7e-06    1.37

The peak does not grow with the batch, of which 4,096 rows are 2 MiB. And the
weights are nearer to the exact ones than those of the large batch: a gradient
here is a sum over 512 numbers of each row, and one sum over two million of them
in float32 rounds more than 128 short ones, whose sums are then added. What
is left, 1e-05, is mostly that five updates each round the weights to float32,
3e-06 of how far they moved.

The times are the weak part: three runs beside other work had 0.65 to 2.2 at
4,096 rows. In float64 such a batch takes 8.6 GiB, most of all. A run takes four
to five minutes. It needs Linux: other systems do not hold to the limit.

With `--jit_compile --limit_mib=128`, `keras.Model` dies at 128 rows, by
SIGABRT, and takes 4,274 MiB for 4,096, of which 103 suffice here. XLA compiles
under the limit, and dies at 96 MiB, with micro-batches too. Its sums round
less: both end up 1e-05 from the exact weights.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
from absl import app
from absl import flags
from matplotlib import figure

from benchmarks import limited_training

FIRST_ROWS = 32
# Our batches, over the largest that `keras.Model` trained under the limit.
MULTIPLES = (1, 16, 64)
# How a process dies where TensorFlow is refused memory and does not say so.
SIGNALS = ("SIGABRT", "SIGBUS", "SIGSEGV")
PLAIN, OURS = "#b5460f", "#08519c"

_LIMIT = flags.DEFINE_integer(
    "limit_mib",
    96,
    "Address space of a training, beyond what it has before the first batch.",
    lower_bound=1,
)
_MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 32, "Rows of a micro-batch.", lower_bound=1
)
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Whether XLA compiles.")
_PICTURE = flags.DEFINE_string(
    "picture", "memory_limit.png", "The PNG file to write."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One training, and what came of it."""

    training: limited_training.Training
    outcome: limited_training.Outcome

    @property
    def is_ours(self) -> bool:
        """Whether this library trained."""
        return self.training.microbatch_size is not None

    @property
    def seconds_per_row(self) -> float:
        """Seconds of an update, over its rows."""
        return self.outcome.seconds / self.training.rows


def run(rows: int, ours: bool, limited: bool, dtype: str = "float32") -> Row:
    """Trains in a process of its own.

    Raises:
        RuntimeError: If the process died of anything but the limit.
    """
    training = limited_training.Training(
        rows=rows,
        microbatch_size=_MICROBATCH_SIZE.value if ours else None,
        limit_mib=_LIMIT.value if limited else None,
        jit_compile=_JIT_COMPILE.value,
        dtype=dtype,
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.limited_training",
            json.dumps(dataclasses.asdict(training)),
        ],
        # By default the C library reserves 64 MiB of address space for many
        # threads, which would be most of what is counted.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        outcome = limited_training.Outcome(**json.loads(result.stdout))
    elif limited and (name := signal_of(result.returncode)) in SIGNALS:
        outcome = limited_training.Outcome(died=name)
    else:
        raise RuntimeError(f"{training} failed:\n{result.stderr[-2000:]}")
    return Row(training, outcome)


def signal_of(status: int) -> str | None:
    """Returns the name of the signal that ended a process, if one did."""
    return signal.Signals(-status).name if status < 0 else None


def double_until_death() -> list[Row]:
    """Trains `keras.Model` under the limit; the last row is where it died."""
    rows = []
    while not rows or not rows[-1].outcome.died:
        size = FIRST_ROWS * 2 ** len(rows)
        rows.append(shown(run(size, ours=False, limited=True)))
    return rows


def weight_error(row: Row, exact: Row) -> float:
    """Returns the weights' distance to exact ones, over how far those moved."""
    end, start = np.array(exact.outcome.end), np.array(exact.outcome.start)
    distance = np.linalg.norm(np.array(row.outcome.end) - end)
    return float(distance / np.linalg.norm(end - start))


def shown(row: Row, exact: Row | None = None, plain: Row | None = None) -> Row:
    """Prints a line of the table, and returns what it is about.

    Args:
        row: What it is about.
        exact: The same batch in float64, if its weights are to be compared.
        plain: The same batch in `keras.Model`, if the times are.
    """
    training, outcome = row.training, row.outcome
    line = (
        f"{'keras_accum' if row.is_ours else 'keras.Model':<12}"
        f"{training.dtype:>8}{training.rows:>6}{training.limit_mib or '-':>7}"
    )
    if outcome.died:
        print(f"{line}  died: {outcome.died}", flush=True)
        return row
    line += (
        f"{outcome.address_mib:>9,.0f}{outcome.resident_mib:>10,.0f}"
        f"{1e3 * row.seconds_per_row:>8.2f}"
    )
    if exact:
        line += f"{weight_error(row, exact):>9.1e}"
    if plain:
        line += f"{row.seconds_per_row / plain.seconds_per_row:>8.2f}"
    print(line, flush=True)
    return row


def peaks(rows: list[Row], ours: bool) -> list[tuple[int, float]]:
    """Returns a model's rows of the batch and peak address spaces in MiB."""
    return [
        (row.training.rows, row.outcome.address_mib)
        for row in rows
        if row.is_ours == ours and not row.outcome.died
    ]


def with_unit(mib: float) -> str:
    """Writes an amount of memory, as the picture shows it."""
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def draw(
    plain: list[tuple[int, float]], ours: list[tuple[int, float]], path: str
) -> None:
    """Writes a picture of the peak memory over the rows of the batch.

    Both axes are linear: that one line rises and the other does not is what
    there is to see.

    Args:
        plain: `peaks` of `keras.Model` without the limit.
        ours: `peaks` of the library.
        path: The PNG file to write.
    """
    picture = figure.Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    name = f"keras_accum, {_MICROBATCH_SIZE.value} rows at a time"
    for points, color, label in (
        (plain, PLAIN, "keras.Model"),
        (ours, OURS, name),
    ):
        rows, mib = zip(*points, strict=True)
        gib = [each / 1024 for each in mib]
        axes.plot(
            rows, gib, "o-", color=color, lw=3, ms=6, clip_on=False, zorder=3
        )
        axes.annotate(
            f"{label}: {with_unit(mib[-1])}",
            (rows[-1], gib[-1]),
            (-12, 6),
            textcoords="offset points",
            color=color,
            fontsize=12,
            fontweight="bold",
            ha="right",
        )
    axes.set_xlim(0, 1.02 * plain[-1][0])
    axes.set_ylim(bottom=0)
    axes.set_title(
        "Memory that one update needs", loc="left", fontsize=13, pad=14
    )
    axes.set_xlabel("rows in the batch")
    axes.set_ylabel("peak memory, GiB")
    axes.set_xticks([rows for rows, _ in plain])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    picture.savefig(path)


def main(argv: list[str]) -> None:
    """Trains, prints the table and draws the picture."""
    del argv
    if sys.platform != "linux":
        sys.exit("It needs Linux: other systems do not hold to the limit.")
    print(
        f"{'':12}{'dtype':>8}{'rows':>6}{'limit':>7}{'address':>9}"
        f"{'resident':>10}{'ms/row':>8}{'weights':>9}{'/ keras':>8}"
    )
    limited = double_until_death()
    if len(limited) == 1:
        sys.exit("keras.Model trained no batch at all: raise --limit_mib.")
    rows = []
    for multiple in MULTIPLES:
        size = multiple * limited[-2].training.rows
        exact = shown(run(size, ours=False, limited=False, dtype="float64"))
        plain = shown(run(size, ours=False, limited=False), exact)
        ours = shown(run(size, ours=True, limited=True), exact, plain)
        if ours.outcome.died:
            sys.exit("Lower --microbatch_size, or raise --limit_mib.")
        rows += [plain, ours]
    draw(peaks(rows, ours=False), peaks(rows, ours=True), _PICTURE.value)


if __name__ == "__main__":
    app.run(main)
