"""Batches far beyond what fits, under one memory limit.

python -m benchmarks.memory_limit
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
MULTIPLES = (1, 4, 16, 64)
# Of the weights, over how far they moved: the rounding of float32.
BOUND = 1e-5
# How a process dies where TensorFlow is refused memory and does not say so.
SIGNALS = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)
PLAIN, OURS, LIMIT = "#b5460f", "#08519c", "#555555"

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
    elif limited and -result.returncode in SIGNALS:
        name = signal.Signals(-result.returncode).name
        outcome = limited_training.Outcome(died=name)
    else:
        raise RuntimeError(f"{training} failed:\n{result.stderr[-2000:]}")
    return Row(training, outcome)


def double_until_death() -> list[Row]:
    """Trains `keras.Model` under the limit; the last row is where it died."""
    rows = []
    while not rows or not rows[-1].outcome.died:
        size = FIRST_ROWS * 2 ** len(rows)
        rows.append(shown(run(size, ours=False, limited=True)))
    return rows


def weight_error(row: Row, exact: Row) -> float:
    """Distance of the weights to exact ones, over how far those moved."""
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
        line += f"{weight_error(row, exact):>9.0e}"
    if plain:
        line += f"{row.seconds_per_row / plain.seconds_per_row:>8.2f}"
    print(line, flush=True)
    return row


def draw(limited: list[Row], rows: list[Row], path: str) -> None:
    """Writes a picture of the peak memory over the rows of the batch.

    Args:
        limited: `keras.Model` under the limit, up to where it died.
        rows: Both, the first without a limit.
        path: The PNG file.
    """
    picture = figure.Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for ours, color in (False, PLAIN), (True, OURS):
        points = [
            (row.training.rows, row.outcome.address_mib)
            for row in rows
            if row.is_ours == ours and not row.outcome.died
        ]
        axes.plot(*zip(*points, strict=True), "o-", color=color, lw=2, ms=5)
    limit, dead = _LIMIT.value, limited[-1].training.rows
    axes.axhline(limit, color=LIMIT, ls="--", lw=1.2)
    axes.plot(dead, limit, "X", color=PLAIN, ms=11, mec="white", zorder=3)
    # Room for what is said of the lowest line.
    axes.set_ylim(bottom=min(row.outcome.address_mib for row in rows) / 2)
    plain, ours = rows[-4], rows[-1]
    for text, row, peak, offset, color in (
        (
            "keras.Model, without a limit",
            plain,
            plain.outcome.address_mib,
            (-8, 6),
            PLAIN,
        ),
        (
            f"keras_accum, micro-batches of {_MICROBATCH_SIZE.value} rows,"
            " under the limit",
            ours,
            ours.outcome.address_mib,
            (0, -16),
            OURS,
        ),
        (f"limit: {limit} MiB", ours, limit, (0, 5), LIMIT),
        (f"keras.Model dies at {dead} rows", limited[-1], limit, (8, 5), PLAIN),
    ):
        axes.annotate(
            text,
            (row.training.rows, peak),
            xytext=offset,
            textcoords="offset points",
            color=color,
            ha="left" if row is limited[-1] else "right",
        )
    axes.set(
        xlabel="rows of the batch, one update each",
        ylabel="peak memory beyond the start",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(
        lambda mib, _: (
            f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.0f} GiB"
        )
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    picture.savefig(path)


def main(argv: list[str]) -> None:
    """Trains, prints the table and draws the picture."""
    del argv
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
        rows += [plain, ours]
    draw(limited, rows, _PICTURE.value)


if __name__ == "__main__":
    app.run(main)
