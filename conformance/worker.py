"""Runs the checks on one system, in the environment that it is run in.

    python -m conformance.worker --system=keras

It prints a line of JSON for each check: its claim, and the figure that was
measured, or why there is none; and what the system warned of.
`conformance.report` runs it, and makes the environments.
"""

import argparse
import importlib
import json
import sys
import warnings

from conformance import checks
from conformance import systems
from conformance.system import DoesNotApply
from conformance.system import NoOption
from conformance.system import System


class Listening(System):
    """A system, and what it warns of where it accumulates and not else.

    Where a check has no reference that tells them apart, nothing is known.

    Args:
        system: The system.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self._heard: dict[str, list[str]] = {}

    def plain(self, problem):
        """Trains on the large batches."""
        return self._listen("plain", problem)

    def accumulated(self, problem):
        """Trains on the micro-batches."""
        return self._listen("accumulated", problem)

    def warnings(self) -> list[str]:
        """Returns the warnings, in order."""
        if "plain" not in self._heard:
            return []
        known = self._heard["plain"]
        return [
            text
            for text in self._heard.get("accumulated", [])
            if text not in known
        ]

    def _listen(self, name, problem):
        with warnings.catch_warnings(record=True) as caught:
            outcome = getattr(self._system, name)(problem)
        heard = self._heard.setdefault(name, [])
        heard += [str(each.message) for each in caught]
        return outcome


def result(check: checks.Check, system: System) -> dict:
    """Returns what came of a check: a figure, or a reason by another name."""
    listening = Listening(system)
    try:
        found = {"figure": check.figure(listening)}
    except DoesNotApply as reason:
        return {"does_not_apply": str(reason)}
    except NoOption as reason:
        return {"no_option": str(reason)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    if listening.warnings():
        found["warning"] = first_line(listening.warnings()[0])
    return found


def first_line(error: Exception | str) -> str:
    """Returns the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), "")


def main():
    """Prints the results."""
    # Not absl's: Keras 2 makes other tensors when it is imported within.
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", required=True, choices=systems.SYSTEMS)
    parser.add_argument(
        "--claim",
        action="append",
        help="Only checks whose claim has this in it, or that of another such.",
    )
    arguments = parser.parse_args()
    about = systems.SYSTEMS[arguments.system]
    module = importlib.import_module(f"conformance.{about.module}")
    system = getattr(module, about.adapter)()
    # What frameworks print does not mix with the results.
    results, sys.stdout = sys.stdout, sys.stderr
    for check in checks.all_checks():
        if not arguments.claim or any(
            part in check.claim for part in arguments.claim
        ):
            line = {"claim": check.claim, "bound": check.bound}
            line |= result(check, system)
            print(json.dumps(line), file=results, flush=True)


if __name__ == "__main__":
    main()
