"""Trains the programs of the suite in each way, and writes what came of it.

    python -m conformance.program_report

Each program, in each way, gets a process of its own. The page is
`docs/programs.md`. With `--programs=gan,vae` only these run, and the others'
rows are those that they left in the folder before.
"""

import collections
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags
from absl import logging

from conformance import environments
from conformance import program_suite as suite
from conformance import report

ROOT = pathlib.Path(__file__).absolute().parent.parent
PAGE = ROOT / "docs" / "programs.md"

_PROGRAMS = flags.DEFINE_list("programs", suite.names(), "Which programs run.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 1, "Runs, of which the fastest counts."
)

INTRODUCTION = """\
# Programs

What happens to a program when its class is swapped? Each row is a short
program for plain Keras, written after a public one. It trains three times, for
{epochs} epochs:

1. as it stands, with batches of {rows} rows;
2. with `accum_steps={steps}`, on batches of {small};
3. with `microbatch_size={small}`, on batches of {rows}.

The columns:

- **lines**: how many lines the swap removes and adds, with the `import`. All
  changes are below the table.
- **weights**: the distance between the last weights and the last weights of
  plain Keras, divided by the distance that plain Keras moved them in its last
  epoch.
- **logs**: the same for the values that `fit` reports: the largest relative
  distance in the last epoch.
- **time** and **memory** of the process, divided by the process of plain
  Keras. The models are tiny here. So this is the time to trace and compile,
  and the memory of TensorFlow. [Performance](performance.md) has the figures
  of larger models.

A distance **in bold** is larger than {bound:.0e}. The number behind it leads to
the reason, below the table: a warning of the library, or what
`keras_accum.verify` prints.

`python -m conformance.program_report` wrote this page. It uses [the
programs](../conformance/programs) and [a module that runs
them](../conformance/program_suite.py).
"""
# What the table has of each program, for both ways.
COLUMNS = ("weights", "logs", "time", "memory")
# Reasons that are not the library's words.
DRAWS = (
    "`verify` finds the model exact. The difference comes from random numbers, "
    "which each micro-batch draws anew, or from rounding in half precision."
)
LOGS = (
    "The `train_step` returns a value that is not a metric. `fit` reports it "
    "for the last micro-batch alone."
)


def measure(name: str) -> dict:
    """Trains a program in each way; returns what came of it."""
    program = suite.program(name)
    with tempfile.TemporaryDirectory() as folder:
        before, _ = train(program, "plain", folder, suite.EPOCHS - 1)
        expected, plain = train(program, "plain", folder)
        results = {"plain": plain}
        for way in suite.WAYS:
            weights, result = train(program, way, folder)
            if "refused" not in result:
                result["weights"] = suite.distance(weights, expected, before)
                result["off"] = suite.distance_of_logs(
                    result["logs"], plain["logs"]
                )
            results[way] = result
    return results


def train(program, way, folder, epochs=suite.EPOCHS):
    """Returns the weights of a program, and what its process printed."""
    weights = pathlib.Path(folder, "weights.npz")
    rounds = []
    for _ in range(_ROUNDS.value):
        finished = subprocess.run(
            [
                sys.executable,
                "-m",
                "conformance.program_worker",
                f"--program={program.name}",
                f"--way={way}",
                f"--epochs={epochs}",
                f"--weights={weights}",
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if finished.returncode:
            raise RuntimeError(
                f"{program.name}, {way}, failed:\n{finished.stderr[-3000:]}"
            )
        rounds.append(json.loads(finished.stdout))
    with np.load(weights) as arrays:
        return list(arrays.values()), min(
            rounds, key=lambda result: result.get("seconds", 0)
        )


def results_path(name: str) -> pathlib.Path:
    """Returns where the results of a program are."""
    return pathlib.Path(environments.FOLDER.value) / f"program_{name}.json"


def page(results: dict[str, dict]) -> str:
    """Returns the page.

    Args:
        results: Program to what `measure` returned.
    """
    notes = report.Notes()
    table = [
        report.row(["program", "after", "lines", *COLUMNS]),
        report.row(["---"] * (3 + len(COLUMNS))),
    ]
    for name, result in results.items():
        program = suite.program(name)
        table.append(
            report.row(
                [
                    f"[{program.title}](../conformance/programs/{name}.py)",
                    f"[source]({program.source})",
                    lines_of(program),
                    *cells_of(result, notes),
                ]
            )
        )
    counts = collections.Counter(
        (way, outcome(result[way]))
        for result in results.values()
        for way in suite.WAYS
    )
    versions = f"Keras {keras.__version__}, TensorFlow {tf.__version__}"
    totals = "; ".join(
        f"`{way}`: {counts[way, 'within']} within {suite.BOUND:.0e}, "
        f"{counts[way, 'beyond']} beyond, {counts[way, 'refused']} refused"
        for way in suite.WAYS
    )
    return "\n".join(
        [
            INTRODUCTION.format(
                bound=suite.BOUND,
                epochs=suite.EPOCHS,
                rows=suite.ROWS,
                steps=suite.STEPS,
                small=suite.ROWS // suite.STEPS,
            ),
            "## Results",
            "",
            f"{len(results)} programs, {versions}, "
            f"{datetime.date.today().isoformat()}. How many have weights "
            f"within the bound, or beyond it, or are refused: {totals}. Each "
            "cell has two values: "
            + ", then ".join(f"`{way}`" for way in suite.WAYS)
            + ".",
            "",
            *table,
            "",
            *notes.lines(),
            "",
            "## What the swap changes",
            "",
            *(line for name in results for line in diff_of(name)),
        ]
    )


def outcome(found: dict) -> str:
    """Returns "refused", or "within" or "beyond" the bound of the weights."""
    if "refused" in found:
        return "refused"
    return "within" if found["weights"] <= suite.BOUND else "beyond"


def cells_of(result: dict, notes: report.Notes) -> list[str]:
    """Returns the cells of a program: for each of `COLUMNS`, both ways.

    Args:
        result: What `measure` returned.
        notes: Where reasons get a number.
    """
    cells = {column: [] for column in COLUMNS}
    for way in suite.WAYS:
        found = result[way]
        if outcome(found) == "refused":
            number = notes.number(f"{found['refused']}.")
            cells["weights"].append(f"refused [{number}]")
            continue
        differs = outcome(found) == "beyond"
        reasons = why(found) if differs else []
        cells["weights"].append(marked(found["weights"], reasons, notes))
        # Where weights differ, logs do for the same reason.
        reasons = [] if differs else [LOGS]
        cells["logs"].append(marked(found["off"], reasons, notes))
        for column, key in (("time", "seconds"), ("memory", "peak")):
            cells[column].append(ratio(found[key], result["plain"][key]))
    return [", ".join(each) for each in cells.values()]


def marked(distance: float, reasons: list[str], notes: report.Notes) -> str:
    """Returns a distance; in bold, with the reasons, if it is too large."""
    text = report.short(distance)
    if distance <= suite.BOUND:
        return text
    numbers = (f" [{notes.number(reason)}]" for reason in reasons)
    return f"**{text}**{''.join(numbers)}"


def ratio(value: float | None, other: float | None) -> str:
    """Returns how many times another value it is; "–" if that is not known."""
    return "\N{EN DASH}" if None in (value, other) else f"{value / other:.2f}"


def why(found: dict) -> list[str]:
    """Returns what the library says of a difference."""
    if found.get("exact"):
        return [DRAWS]
    causes = [
        f"{cause[0].upper()}{cause[1:]}." for cause in found.get("causes", ())
    ]
    return [warning.split("\n")[0] for warning in found["warnings"]] or causes


def is_silent(found: dict) -> bool:
    """Returns whether weights differ, and nothing says why."""
    return outcome(found) == "beyond" and not why(found)


def lines_of(program: suite.Program) -> str:
    """Returns how many lines the swap removes and adds: "-1 +2"."""
    changes = program.changes(next(iter(suite.WAYS)))
    removed = sum(line.startswith("-") for line in changes)
    added = sum(line.startswith("+") for line in changes)
    return f"\N{MINUS SIGN}{removed} +{added}"


def diff_of(name: str) -> list[str]:
    """Returns the section of a program: its diff."""
    program = suite.program(name)
    way = next(way for way in suite.WAYS if way not in program.refused)
    return [
        f"### {program.title}",
        "",
        "```diff",
        *program.changes(way),
        "```",
        "",
    ]


def main(argv):
    """Trains, and writes the page."""
    del argv
    if unknown := set(_PROGRAMS.value) - set(suite.names()):
        sys.exit(f"--programs has no {', '.join(sorted(unknown))}.")
    pathlib.Path(environments.FOLDER.value).mkdir(parents=True, exist_ok=True)
    for name in _PROGRAMS.value:
        logging.info("%s", name)
        results_path(name).write_text(
            json.dumps(measure(name)), encoding="utf-8"
        )
    results = {
        name: json.loads(results_path(name).read_text(encoding="utf-8"))
        for name in suite.names()
        if results_path(name).exists()
    }
    PAGE.write_text(page(results).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
