"""What accumulation costs, against every peer: `docs/performance.md`.

    python -m benchmarks.compare

Three models, the same in every framework, and each system in an environment of
its own, which `conformance.report` makes too. All of a model's processes are
started, and then asked for windows in turn, round after round, in an order that
changes, so that a busy machine slows all alike; those that wait take no time.
The figures to quote are medians over the rounds of ratios within a round.

`--models=MLP --systems=keras_accum` measures less; what was measured before is
kept in the folder, and the page is written from all of it.
"""

import datetime
import json
import pathlib
import random
import subprocess
import sys

from absl import app
from absl import flags
from absl import logging

from benchmarks import compare_page
from benchmarks.compare_models import CASES
from benchmarks.compare_page import FIRST_STEPS
from benchmarks.compare_page import OTHERS
from benchmarks.compare_page import ROWS
from conformance import environments
from conformance.systems import SYSTEMS

ROOT = pathlib.Path(__file__).absolute().parent.parent

# System: the program that has it, the environment, and the ways to train.
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
    """Times each way in each round: "system name" to a list of seconds."""
    processes = {system: Process(system, model) for system in _SYSTEMS.value}
    ways = [
        (system, name) for system in processes for name in PROGRAMS[system][2]
    ]
    times = {f"{system} {name}": [] for system, name in ways}
    rng = random.Random(0)
    # One round before: they trace and compile.
    for index in range(_ROUNDS.value + 1):
        # Nobody always follows the same one.
        rng.shuffle(ways)
        for system, name in ways:
            seconds = processes[system].ask("window", name=name)
            if index > 0:
                times[f"{system} {name}"].append(seconds)
    for process in processes.values():
        process.__exit__()
    return times


def time_first_steps(model: str) -> dict[str, dict[str, list[float]]]:
    """Times first steps: seconds of a row of the table, by k."""
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
    """Measures the most bytes of a process, of each row and of "plain"."""
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
    """Counts what a change of k traces or compiles again, of each row."""
    found = {}
    for title, (system, name) in rows():
        with Process(system, model) as process:
            found[title] = process.ask("traces", name=name)
    return found


def rows():
    """Returns the rows of the systems that are measured."""
    return [row for row in ROWS.items() if row[1][0] in _SYSTEMS.value]


def look_at_ours(model: str) -> dict:
    """Measures this library's scratch memory and host work, and the machine."""
    if "keras_accum" not in _SYSTEMS.value:
        return {}
    with Process("keras_accum", model) as process:
        return {
            part: process.ask(part) for part in ("scratch", "host", "machine")
        }


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
    results = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    )
    for part in _PARTS.value:
        logging.info("%s: %s", model, part)
        results[part] = results.get(part, {}) | PARTS[part](model)
        results["date"] = datetime.date.today().isoformat()
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")


def results_path(model: str) -> pathlib.Path:
    """Returns where the results of a model are."""
    return pathlib.Path(_FOLDER.value) / f"compare_{model}.json"


def main(argv):
    """Measures, and writes the page and its picture."""
    del argv
    for flag, names in (
        (_MODELS, CASES),
        (_SYSTEMS, PROGRAMS),
        (_PARTS, PARTS),
    ):
        unknown = set(flag.value) - set(names)
        if unknown:
            sys.exit(f"--{flag.name} has no {', '.join(sorted(unknown))}.")
    for model in _MODELS.value:
        measure(model)
    results = {
        model: json.loads(results_path(model).read_text(encoding="utf-8"))
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
    page = ROOT / "docs" / "performance.md"
    compare_page.draw(results, page.with_suffix(".png"))
    page.write_text(compare_page.page(results, versions), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
