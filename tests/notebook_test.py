"""The notebook runs from top to bottom, and prints what it claims."""

import re
import sys
import unittest

import nbformat
import pytest
from absl.testing import absltest

from tools import run_notebook

LIMIT = 200


def outputs(notebook):
    """Returns all outputs of all cells."""
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def printed(notebook):
    """Returns what all cells print, as one text."""
    return "".join(
        output.text
        for output in outputs(notebook)
        if output.output_type == "stream" and output.name == "stdout"
    )


class NotebookTest(absltest.TestCase):
    def check(self, notebook):
        """Checks the outputs, as a reader looks for them."""
        text = printed(notebook)
        self.assertRegex(
            text,
            rf"768 rows at once, limit {LIMIT} MiB: failed with"
            r" ResourceExhaustedError\.\nOOM when allocating tensor",
        )

        pattern = (
            r"{} rows at once, {}: 16 updates, peak (\d+) MiB, loss (\d\.\d+)\."
        )
        ours = re.search(pattern.format(32, f"limit {LIMIT} MiB"), text)
        large = re.search(pattern.format(768, "no limit"), text)
        self.assertIsNotNone(ours, text)
        self.assertIsNotNone(large, text)
        self.assertLess(int(ours[1]), LIMIT)
        self.assertGreater(int(large[1]), LIMIT)
        self.assertAlmostEqual(float(ours[2]), float(large[2]), delta=0.0015)
        # It is 2.3 where all digits are as likely.
        self.assertLess(float(ours[2]), 1.5)

        found = re.search(r"max \|difference\| of all weights: (\S+)", text)
        self.assertLessEqual(float(found[1]), 1e-5)
        self.assertIn("\nThe model is exact.", text)
        pictures = [
            output
            for output in outputs(notebook)
            if "image/png" in output.get("data", {})
        ]
        self.assertLen(pictures, 1)

    def test_committed_outputs_are_what_it_claims(self):
        self.check(run_notebook.read())

    def test_committed_outputs_have_nothing_of_a_machine(self):
        notebook = run_notebook.read()
        nbformat.validate(notebook)
        for output in outputs(notebook):
            if output.output_type == "stream":
                self.assertEqual(output.name, "stdout")
                # Neither paths nor the colours of a terminal.
                self.assertNotRegex(
                    output.text, r"(?<!\w)/\w+/\w|\b[A-Z]:\\|\x1b"
                )
            else:
                self.assertEqual(output.output_type, "display_data")
        self.assertEqual(set(notebook.metadata.language_info), {"name"})
        for cell in notebook.cells:
            self.assertEmpty(cell.metadata)

    @unittest.skipUnless(
        sys.platform == "linux", "Linux alone holds to a limit of addresses."
    )
    @pytest.mark.thorough
    def test_runs_from_top_to_bottom(self):
        notebook = run_notebook.read()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        # It keeps its files elsewhere, not beside the notebook.
        self.assertEmpty(run_notebook.execute(notebook))
        self.check(notebook)


if __name__ == "__main__":
    absltest.main()
