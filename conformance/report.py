"""The conformance table: runs the checks on each system, and writes it down.

    python -m conformance.report

Each system gets an environment of its own, in `--folder`, with the newest
releases that `pip` finds for it, and runs there in a process of its own. The
table goes to `docs/conformance.md`, its totals to `README.md`. With
`--systems=keras,lightning` only these run, and the others' rows are those that
they left in the folder before.
"""

import datetime
import json
import pathlib
import platform
import re
import subprocess
import sys

from absl import app
from absl import flags
from absl import logging

from conformance import checks
from conformance import environments
from conformance import systems

ROOT = pathlib.Path(__file__).absolute().parent.parent
TABLE = ROOT / "docs" / "conformance.md"
README = ROOT / "README.md"

_SYSTEMS = flags.DEFINE_list(
    "systems", list(systems.SYSTEMS), "Which systems run."
)
_FOLDER = environments.FOLDER

INTRODUCTION = """\
# Conformance

Which ways to accumulate compute the right thing? Each row is a claim about
gradient accumulation. Each column is a way to accumulate. Every system trains
the same small models twice, from the same weights and on the same rows: first
on the large batch, without accumulation; then in micro-batches, as its
documentation says.

If the row says nothing else, the figure is the distance between the two sets
of weights, divided by the distance that the large batch moved them. So 1e-07
is rounding, and 1 means that the error is as large as the change by training.
Each system is compared with itself only: differences between frameworks do not
count.

| in the table | meaning | passed? |
| --- | --- | --- |
| a figure | It is within the bound of the row. | yes |
| a figure **in bold** | It is not within the bound. | no |
| the same, and "warns" | The same, but the system warns. | no |
| "no option" | The system has no setting for it. | no |
| "error" | The system fails with an error. | no |
| "–" | The claim does not apply to the system. | not counted |

A number in brackets leads to the reasons, below the tables.

`python -m conformance.report` wrote this page. It makes an environment for
each system, installs the system, and runs [the
checks](../conformance/checks.py) there. Beside the checks is an adapter for
each system, which shows how it is used. Corrections by people who know a
system better are welcome.
"""


def measure(name: str) -> None:
    """Runs the checks on a system; leaves the results in the folder."""
    about = systems.SYSTEMS[name]
    python = environments.make(name, about.packages)
    results = {
        "versions": environments.versions(python, about.shown),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "checks": {},
    }
    finished = subprocess.run(
        [python, "-m", "conformance.worker", f"--system={name}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    for line in finished.stdout.splitlines():
        result = json.loads(line)
        results["checks"][result.pop("claim")] = result
    for check in checks.all_checks():
        if check.claim not in results["checks"]:
            logging.error("%s ended early: %s", name, finished.stderr[-2000:])
            reason = {"error": "The process ended.", "bound": check.bound}
            results["checks"][check.claim] = reason
    with open(results_path(name), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


def results_path(name: str) -> pathlib.Path:
    """Returns where the results of a system are."""
    return pathlib.Path(_FOLDER.value) / f"{name}.json"


def passes(result: dict) -> bool:
    """Returns whether a figure was measured, and is within its bound."""
    return result.get("figure", float("inf")) <= result["bound"]


def applies(result: dict) -> bool:
    """Returns whether the claim is about something that the system does."""
    return "does_not_apply" not in result


def short(figure: float) -> str:
    """Returns a figure in few characters: "0", "2e-07", "0.93"."""
    if figure == 0:
        return "0"
    if figure == float("inf"):
        return "not finite"
    return f"{figure:.0e}" if figure < 1e-2 else f"{figure:.2g}"


class Notes:
    """Reasons, each of which gets a number."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def number(self, reason: str) -> int:
        """Returns the number of a reason, from 1."""
        if reason not in self._reasons:
            self._reasons.append(reason)
        return self._reasons.index(reason) + 1

    def lines(self) -> list[str]:
        """Returns the reasons as a numbered list."""
        return [f"{i}. {text}" for i, text in enumerate(self._reasons, 1)]


def cell(result: dict, notes: Notes) -> str:
    """Returns what the table says of a result."""
    if "figure" in result:
        text = short(result["figure"])
        if passes(result):
            return text
        if "warning" not in result:
            return f"**{text}**"
        number = notes.number(escaped(result["warning"]))
        return f"**{text}** warns [{number}]"
    for key, text in (
        ("does_not_apply", "–"),
        ("no_option", "**no option**"),
        ("error", "**error**"),
    ):
        if key in result:
            return f"{text} [{notes.number(escaped(result[key]))}]"
    raise ValueError(f"There is no result. Received: {result}")


def escaped(text: str) -> str:
    """Returns text as one line of Markdown, without this machine's paths."""
    text = re.sub(r"(/[\w.+-]+){2,}/", "…/", text)
    text = text if len(text) <= 160 else f"{text[:159]}…"
    return re.sub(r"([*_<>|])", r"\\\1", text)


def row(cells) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def totals(results: dict[str, dict]) -> list[str]:
    """Returns a table of how many checks each system passes."""
    lines = [row(["", "checks passed", "checks that apply", "releases"])]
    lines.append(row(["---", "---:", "---:", "---"]))
    for name, result in results.items():
        applying = [r for r in result["checks"].values() if applies(r)]
        passed = sum(passes(r) for r in applying)
        title = systems.SYSTEMS[name].title
        lines.append(
            row([title, str(passed), str(len(applying)), result["versions"]])
        )
    return lines


def page(results: dict[str, dict]) -> str:
    """Returns the whole of `docs/conformance.md`."""
    dates = sorted({result["date"] for result in results.values()})
    python = sorted({result["python"] for result in results.values()})
    measured = f"Measured on {' to '.join(dates)}, Python {', '.join(python)}."
    lines = [INTRODUCTION, "## Totals", "", measured, "", *totals(results)]
    lines += ["", "## How each is used", ""]
    lines += [
        f"- **{systems.SYSTEMS[name].title}**: {systems.SYSTEMS[name].usage}"
        for name in results
    ]
    notes, topic = Notes(), None
    for check in checks.all_checks():
        if check.topic != topic:
            topic = check.topic
            titles = [systems.SYSTEMS[name].title for name in results]
            lines += ["", f"## {topic}", "", row(["", "bound", *titles])]
            lines.append(row(["---", "---:", *["---:"] * len(titles)]))
        cells = [
            cell(result["checks"][check.claim], notes)
            for result in results.values()
        ]
        lines.append(row([check.claim, short(check.bound), *cells]))
    lines += ["", "## Reasons", "", *notes.lines(), ""]
    return "\n".join(lines)


def with_totals(readme: str, results: dict[str, dict]) -> str:
    """Returns the README, with these totals between its two marks."""
    begin, end = "<!-- conformance: begin -->", "<!-- conformance: end -->"
    table = "\n".join([begin, *totals(results), end])
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    return re.sub(pattern, lambda _: table, readme, flags=re.DOTALL)


def main(argv):
    """Measures, and writes the table and the totals."""
    del argv
    unknown = set(_SYSTEMS.value) - set(systems.SYSTEMS)
    if unknown:
        sys.exit(f"--systems has no {', '.join(sorted(unknown))}.")
    pathlib.Path(_FOLDER.value).mkdir(parents=True, exist_ok=True)
    for name in _SYSTEMS.value:
        logging.info("%s", systems.SYSTEMS[name].title)
        measure(name)
    results = {}
    for name in systems.SYSTEMS:
        if results_path(name).exists():
            results[name] = json.loads(
                results_path(name).read_text(encoding="utf-8")
            )
    TABLE.write_text(page(results), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(with_totals(readme, results), encoding="utf-8")
    print("\n".join(totals(results)))


if __name__ == "__main__":
    app.run(main)
