"""This library against the checks of the conformance table; and the table."""

import json
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf
from absl.testing import parameterized

from conformance import checks
from conformance import report
from conformance import systems
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent

# What couples the rows of a batch needs all of them: `accum_steps` never has
# them, and a layer that adds a loss is not called with them. It warns of both.
BALANCES = "A layer adds a loss that balances: it couples rows"
FAILING = {
    "accum_steps": {
        BALANCES,
        "A contrastive loss between the rows of the batch",
    },
    "microbatch_size": {BALANCES},
}


class ChecksTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("accum_steps", "microbatch_size")
    @test_utils.first_command(1)
    @pytest.mark.thorough
    @pytest.mark.long
    def test_passes(self, system):
        claims = [check.claim for check in checks.all_checks()]
        if not test_utils.IS_NIGHTLY:
            # Other tests have each of them, too: a third for each system.
            claims = claims[list(FAILING).index(system) :: 3]
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "conformance.worker"),
                f"--system={system}",
                *(f"--claim={claim}" for claim in claims),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        self.assertEqual(finished.returncode, 0, finished.stderr[-4000:])
        results = {
            result["claim"]: result
            for result in map(json.loads, finished.stdout.splitlines())
        }
        self.assertContainsSubset(claims, results)
        failing = {
            claim
            for claim, result in results.items()
            if report.applies(result) and not report.passes(result)
        }
        self.assertEqual(failing, FAILING[system] & set(results), results)
        for claim in failing:
            self.assertIn("warning", results[claim], claim)

    def test_claims_are_about_different_things(self):
        claims = [check.claim for check in checks.all_checks()]
        self.assertLen(set(claims), len(claims))


class ReportTest(tf.test.TestCase):
    def results(self, **differing):
        """Results in which all passes but what is said."""
        return {
            "date": "2020-01-02",
            "python": "3.11.0",
            "versions": "keras 3.0.0",
            "checks": {
                check.claim: {"bound": check.bound, "figure": 0.0}
                for check in checks.all_checks()
            }
            | differing,
        }

    def test_counts_what_passes_and_what_applies(self):
        first, second, third, *_ = [c.claim for c in checks.all_checks()]
        results = self.results(
            **{
                first: {"bound": 1, "does_not_apply": "It has no layers."},
                second: {"bound": 1, "no_option": "It cannot."},
                third: {"bound": 1, "figure": 2},
            }
        )
        total = len(checks.all_checks())
        self.assertEqual(
            report.totals({"keras": results})[-1],
            f"| Keras | {total - 3} | {total - 1} | keras 3.0.0 |",
        )

    def test_says_why_there_is_no_figure(self):
        notes = report.Notes()
        cells = [
            report.cell(result, notes)
            for result in (
                {"bound": 1e-4, "figure": 2e-7},
                {"bound": 1e-4, "figure": 0.5},
                {"bound": 1e-4, "figure": 0.5, "warning": "It is not so."},
                {"bound": 1e-4, "figure": 2e-7, "warning": "It is so."},
                {"bound": 1e-4, "figure": float("inf")},
                {"bound": 1e-4, "error": "ValueError: it * failed"},
                {"bound": 1e-4, "does_not_apply": "It has no layers."},
                {"bound": 1e-4, "error": "ValueError: it * failed"},
            )
        ]
        self.assertEqual(
            cells,
            [
                "2e-07",
                "**0.5**",
                "**0.5** warns [1]",
                "2e-07",
                "**not finite**",
                "**error** [2]",
                "– [3]",
                "**error** [2]",
            ],
        )
        self.assertEqual(
            notes.lines(),
            [
                "1. It is not so.",
                r"2. ValueError: it \* failed",
                "3. It has no layers.",
            ],
        )

    def test_names_no_path_of_the_machine(self):
        self.assertEqual(
            report.escaped("in /tmp/a/lib/python3.11/x.py, line 3"),
            "in …/x.py, line 3",
        )

    def test_replaces_the_totals_of_the_readme(self):
        begin, end = "<!-- conformance: begin -->", "<!-- conformance: end -->"
        readme = f"a\n{begin}\nold\n{end}\nb\n"
        replaced = report.with_totals(readme, {"keras": self.results()})
        self.assertNotIn("old", replaced)
        self.assertStartsWith(replaced, f"a\n{begin}\n|  | checks passed")
        self.assertEndsWith(replaced, f"|\n{end}\nb\n")

    def test_the_page_is_of_these_checks_and_systems(self):
        page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
        for check in checks.all_checks():
            self.assertIn(f"| {check.claim} |", page)
        for about in systems.SYSTEMS.values():
            self.assertIn(about.title, page)


if __name__ == "__main__":
    tf.test.main()
