"""Processes of `benchmarks.compare`: they do what they are told, and time it.

A framework's program subclasses `Contestants` and calls `serve`. It then reads
commands from standard input, a line of JSON each, and answers each with one:

* `{"do": "window", "name": "plain"}`: trains on two windows; the seconds of the
  second, since the first finds caches and cores as another process left them.
* `{"do": "first", "name": "window", "accum_steps": 8}`: makes a new model, and
  takes its first step; the seconds of the step alone.
* `{"do": "memory"}`: the most memory that the process has had, in bytes.
* `{"do": "traces", "name": "window"}`: what was traced or compiled when k
  changed, after a window with the first k; the number, or null where nothing
  is compiled or k cannot be changed.
* `{"do": "scratch"}`, `{"do": "host"}`, `{"do": "machine"}`: see `Contestants`.
"""

import abc
import argparse
import json
import os
import sys
import time
from collections.abc import Callable

from benchmarks.compare_models import CASES
from benchmarks.compare_models import Case


class Contestants(abc.ABC):
    """The ways of one framework to train on a window's micro-batches.

    Args:
        model: The name of one of `CASES`.
    """

    # "plain": k updates without accumulation, one for each micro-batch.
    # "whole": one update from the rows of all micro-batches at once.
    # "ideal": k gradients that nothing is done with, but for one update.
    # Others accumulate.
    names: tuple[str, ...] = ()

    def __init__(self, model: str) -> None:
        self.model = model
        self.case: Case = CASES[model]

    @abc.abstractmethod
    def make(self, name: str, accum_steps: int) -> Callable[[], None]:
        """Returns a function that trains on one window, to its end."""

    def first_step(self, name: str, accum_steps: int) -> Callable[[], None]:
        """Returns a function that takes a new model's first step.

        That is the first of a window's programs, if there are several. By
        default it is a whole window.
        """
        return self.make(name, accum_steps)

    def traces(self, name: str) -> int | None:
        """Counts what is traced or compiled again when k changes."""
        del name
        return None

    def scratch(self) -> dict[str, int]:
        """Returns the bytes that the compiler plans, of "plain" and "window".

        What goes in, what stays and what comes out do not count.
        """
        raise NotImplementedError

    def host(self) -> tuple[float, float, float]:
        """Returns the host's work per micro-batch, over that of plain training.

        The lower quartile, the median and the upper quartile.
        """
        raise NotImplementedError

    def machine(self) -> dict[str, float]:
        """Returns what the machine can do in a second, at best.

        "bytes" to and from the memory, in a sum of two long vectors;
        "operations" in the product of two large matrices, in float32.
        """
        raise NotImplementedError


def seconds(function: Callable[[], None]) -> float:
    """Returns the wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """Returns the most resident memory of this process so far, on Linux."""
    # Windows has no such module, and macOS counts bytes.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(contestants, made, command):
    """Does what a command says; returns what is to be answered."""
    do, name = command["do"], command.get("name")
    if do == "memory":
        return peak_bytes()
    if do == "traces":
        return contestants.traces(name)
    if do in ("scratch", "host", "machine"):
        return getattr(contestants, do)()
    if do == "first":
        return seconds(contestants.first_step(name, command["accum_steps"]))
    if name not in made:
        made[name] = contestants.make(name, contestants.case.accum_steps)
    made[name]()
    return seconds(made[name])


def serve(classes: dict[str, type[Contestants]]) -> None:
    """Reads commands from standard input until it ends.

    Args:
        classes: By the name that is given as `--system`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, choices=CASES)
    parser.add_argument("--system", required=True, choices=classes)
    arguments = parser.parse_args()
    # What frameworks print does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    contestants = classes[arguments.system](arguments.model)
    made = {}
    for line in sys.stdin:
        result = answer(contestants, made, json.loads(line))
        print(json.dumps(result), file=answers, flush=True)
