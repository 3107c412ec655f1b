"""What accumulation costs, against every peer: `docs/performance.md`.

    python -m benchmarks.compare

Three models, the same in every framework, and each system in an environment of
its own, which `conformance.report` makes too. All of a model's processes are
started, and then asked for a window in turn, round after round, so that a busy
machine slows all alike; those that wait take no time. The figures to quote are
medians over the rounds of ratios within a round.

`--models=MLP --systems=keras_accum` measures less; what was measured before is
kept in the folder, and the page is written from all of it.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

import matplotlib
from absl import app
from absl import flags
from absl import logging

from benchmarks.compare_models import CASES
from conformance import environments
from conformance.systems import SYSTEMS

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).absolute().parent.parent
PAGE = ROOT / "docs" / "performance.md"

# System: the program that has it, the environment, and the ways to train.
OTHERS = ("plain", "whole", "ideal")
PROGRAMS = {
    "keras_accum": (
        "compare_keras",
        "accum_steps",
        ("window", "steps", "cut", "keras", *OTHERS),
    ),
    "gradient_accumulator": (
        "compare_keras",
        "gradient_accumulator",
        ("window", *OTHERS),
    ),
    "multi_steps": ("compare_optax", "multi_steps", ("window", *OTHERS)),
    "optax_microbatch": (
        "compare_optax",
        "optax_microbatch",
        ("window", *OTHERS),
    ),
    "torch_loop": ("compare_torch", "torch_loop", ("window", *OTHERS)),
    "lightning": ("compare_torch", "lightning", ("window", *OTHERS)),
    "accelerate": ("compare_torch", "accelerate", ("window", *OTHERS)),
}
# The rows of the tables: what accumulates, and in which process.
ROWS = {
    "keras_accum, `accum_steps`": ("keras_accum", "window"),
    "the same, `steps_per_execution=k`": ("keras_accum", "steps"),
    "keras_accum, `microbatch_size`": ("keras_accum", "cut"),
    "Keras": ("keras_accum", "keras"),
    "gradient-accumulator": ("gradient_accumulator", "window"),
    "optax.MultiSteps": ("multi_steps", "window"),
    "optax.microbatching": ("optax_microbatch", "window"),
    "PyTorch, loop": ("torch_loop", "window"),
    "Lightning": ("lightning", "window"),
    "Accelerate": ("accelerate", "window"),
}
FIRST_STEPS = (2, 8, 64)

_MODELS = flags.DEFINE_list("models", list(CASES), "Which models.")
_SYSTEMS = flags.DEFINE_list("systems", list(PROGRAMS), "Which systems.")
_PARTS = flags.DEFINE_list(
    "parts", ["times", "first", "memory", "traces", "ours"], "What to measure."
)
_ROUNDS = flags.DEFINE_integer("rounds", 21, "Rounds that are timed.")
_FIRST_ROUNDS = flags.DEFINE_integer(
    "first_rounds", 3, "Rounds of first steps."
)
_FOLDER = environments.FOLDER


class Process:
    """A process that trains in one system, on one model."""

    def __init__(self, system: str, model: str) -> None:
        module, environment, _ = PROGRAMS[system]
        python = environments.make(environment, SYSTEMS[environment].packages)
        self._process = subprocess.Popen(
            [
                python,
                "-m",
                f"benchmarks.{module}",
                f"--model={model}",
                f"--system={system}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )

    def ask(self, do: str, **command):
        """Sends a command; returns the answer. `compare_worker` has them."""
        print(
            json.dumps({"do": do} | command),
            file=self._process.stdin,
            flush=True,
        )
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process of {self._process.args} ended.")
        return json.loads(answer)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()


def time_windows(model: str) -> dict[str, list[float]]:
    """Seconds of each way in each round: "system name" to a list."""
    processes = {system: Process(system, model) for system in _SYSTEMS.value}
    ways = [
        (system, name) for system in processes for name in PROGRAMS[system][2]
    ]
    times = {f"{system} {name}": [] for system, name in ways}
    # Two rounds before: they trace and compile.
    for index in range(_ROUNDS.value + 2):
        start = index % len(ways)
        for system, name in ways[start:] + ways[:start]:
            seconds = processes[system].ask("window", name=name)
            if index >= 2:
                times[f"{system} {name}"].append(seconds)
    for process in processes.values():
        process.__exit__()
    return times


def time_first_steps(model: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of first steps: of a row of the table, by k."""
    found = {}
    for title, (system, name) in rows():
        with Process(system, model) as process:
            times = {str(k): [] for k in FIRST_STEPS}
            for index in range(_FIRST_ROUNDS.value + 1):
                for k in FIRST_STEPS:
                    seconds = process.ask("first", name=name, accum_steps=k)
                    # The framework starts up in the first.
                    if index > 0:
                        times[str(k)].append(seconds)
        found[title] = times
    return found


def measure_memory(model: str) -> dict[str, dict[str, int]]:
    """Most bytes of a process: of a row, that of the way and of "plain"."""
    found = {}
    for title, (system, name) in rows():
        found[title] = {}
        for key in (name, "plain"):
            with Process(system, model) as process:
                for _ in range(3):
                    process.ask("window", name=key)
                kind = "plain" if key == "plain" else "window"
                found[title][kind] = process.ask("memory")
    return found


def count_traces(model: str) -> dict[str, int | None]:
    """What a change of k traces or compiles again, of each row."""
    found = {}
    for title, (system, name) in rows():
        with Process(system, model) as process:
            found[title] = process.ask("traces", name=name)
    return found


def rows():
    """The rows of the systems that are measured."""
    return [row for row in ROWS.items() if row[1][0] in _SYSTEMS.value]


def look_at_ours(model: str) -> dict:
    """Scratch memory and work of the host, which are of this library alone."""
    if "keras_accum" not in _SYSTEMS.value:
        return {}
    with Process("keras_accum", model) as process:
        return {"scratch": process.ask("scratch"), "host": process.ask("host")}


PARTS = {
    "times": time_windows,
    "first": time_first_steps,
    "memory": measure_memory,
    "traces": count_traces,
    "ours": look_at_ours,
}


def measure(model: str) -> None:
    """Measures a model; adds it to what the folder has."""
    path = results_path(model)
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in _PARTS.value:
        logging.info("%s: %s", model, part)
        results[part] = results.get(part, {}) | PARTS[part](model)
        results["date"] = datetime.date.today().isoformat()
        path.write_text(json.dumps(results, indent=1))


def results_path(model: str) -> pathlib.Path:
    """Where the results of a model are."""
    return pathlib.Path(_FOLDER.value) / f"compare_{model}.json"


def ratio(times, top: str, bottom: str) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of a ratio over the rounds."""
    pairs = zip(times[top], times[bottom], strict=True)
    return tuple(statistics.quantiles([a / b for a, b in pairs], n=4))


def said(quartiles) -> str:
    """A ratio in the table: median, and the middle half."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def line(cells) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def time_table(results) -> list[str]:
    """The table of times of a model."""
    times = results["times"]
    lines = [
        line(
            [
                "",
                "ms per window",
                "/ k plain steps",
                "/ one step of the whole",
                "/ its ideal",
                "/ `accum_steps`",
            ]
        ),
        line(["---", *["---:"] * 5]),
    ]
    for title, (system, name) in ROWS.items():
        way = f"{system} {name}"
        if way in times:
            others = [f"{system} {other}" for other in OTHERS]
            ratios = [ratio(times, way, bottom) for bottom in others]
            ratios.append(ratio(times, way, "keras_accum window"))
            median = f"{1e3 * statistics.median(times[way]):.1f}"
            lines.append(line([title, median, *map(said, ratios)]))
    return lines


def other_table(results) -> list[str]:
    """The table of memory, first steps and traces of a model."""
    heads = [f"first step, k = {k}, s" for k in FIRST_STEPS]
    lines = [
        line(
            [
                "",
                "peak, MB",
                "over plain, MB",
                *heads,
                "k = 64 / k = 2",
                "traces",
            ]
        ),
        line(["---", *["---:"] * (len(heads) + 4)]),
    ]
    for title in ROWS:
        if title in results["memory"]:
            memory = results["memory"][title]
            first = results["first"][title]
            medians = [statistics.median(first[str(k)]) for k in FIRST_STEPS]
            traces = results["traces"][title]
            lines.append(
                line(
                    [
                        title,
                        f"{memory['window'] / 1e6:.0f}",
                        f"{(memory['window'] - memory['plain']) / 1e6:.0f}",
                        *(f"{median:.2f}" for median in medians),
                        f"{medians[-1] / medians[0]:.2f}",
                        "–" if traces is None else str(traces),
                    ]
                )
            )
    return lines


def draw(results: dict[str, dict]) -> None:
    """Draws windows over k plain steps of the same framework."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4 * len(results), 3.6), sharey=True
    )
    for axis, (model, result) in zip(
        axes if len(results) > 1 else [axes], results.items(), strict=True
    ):
        times = result["times"]
        shown = [
            (title, ratio(times, f"{system} {name}", f"{system} plain"))
            for title, (system, name) in reversed(ROWS.items())
            if f"{system} {name}" in times
        ]
        names = [title.replace("`", "") for title, _ in shown]
        middles = [quartiles[1] for _, quartiles in shown]
        spread = [
            [q[1] - q[0] for _, q in shown],
            [q[2] - q[1] for _, q in shown],
        ]
        colors = ["C0" if "accum," in name else "0.7" for name in names]
        axis.barh(names, middles, xerr=spread, color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(model)
        axis.set_xlabel("window / k plain steps")
    figure.tight_layout()
    figure.savefig(PAGE.with_suffix(".png"), dpi=120)


INTRODUCTION = """\
# Performance

What accumulation costs, in time and memory, on a CPU. `python -m
benchmarks.compare` measured it and wrote this page. Each system trains three
models, the same in every framework and from the same data, in processes that
take turns, with as many threads as there are cores. Ratios are medians over the
rounds, with the middle half of them in brackets.

- **MLP**: 8.9 million parameters, micro-batches of 4 rows, k = 8, Adam.
- **transformer**: decoder-only, 2.9 million parameters, 4 rows of 64 tokens,
  k = 8, AdamW.
- **convolutional**: 1.1 million parameters, with batch normalisation, 8 images
  of 32 x 32, k = 4, SGD.

"k plain steps" are updates without accumulation, one for each micro-batch; "one
step of the whole" is one update from all rows at once, for those who have the
memory; "its ideal" is k gradients that nothing is done with, and one update.
All three are of the same framework as the row, so that frameworks' kernels do
not count; the last column compares across frameworks, where they do.

![Time of a window over that of k plain steps](performance.png)
"""


def page(results: dict[str, dict], versions: dict[str, str]) -> str:
    """The whole of `docs/performance.md`."""
    dates = sorted({result["date"] for result in results.values()})
    lines = [
        INTRODUCTION,
        f"Measured on {' to '.join(dates)}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}: "
        f"{'; '.join(versions.values())}.",
    ]
    for model, result in results.items():
        lines += ["", f"## {model}", "", *time_table(result)]
        lines += ["", *other_table(result), ""]
        if ours := result["ours"]:
            scratch, host = ours["scratch"], ours["host"]
            lines += [
                f"Scratch memory that XLA plans, `accum_steps`: "
                f"{scratch['window'] / 1e6:.1f} MB for a micro-batch in a "
                f"window, {scratch['plain'] / 1e6:.1f} MB for a plain step: "
                f"{scratch['window'] / scratch['plain']:.2f}.",
                "",
                "Host work per micro-batch, an almost empty model in `fit`, "
                f"over `keras.Model`: {said(host)}.",
            ]
    return "\n".join([*lines, ""])


def main(argv):
    """Measures, and writes the page and its picture."""
    del argv
    for given, known in (
        (_MODELS, CASES),
        (_SYSTEMS, PROGRAMS),
        (_PARTS, PARTS),
    ):
        unknown = set(given.value) - set(known)
        if unknown:
            sys.exit(f"--{given.name} has no {', '.join(sorted(unknown))}.")
    for model in _MODELS.value:
        measure(model)
    results = {
        model: json.loads(results_path(model).read_text())
        for model in CASES
        if results_path(model).exists()
    }
    versions = {
        environment: environments.versions(
            environments.python_of(environment), SYSTEMS[environment].shown
        )
        for _, environment, _ in PROGRAMS.values()
        if environments.python_of(environment).exists()
    }
    draw(results)
    PAGE.write_text(page(results, versions))


if __name__ == "__main__":
    app.run(main)
