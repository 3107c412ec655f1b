"""The pages for newcomers run as they stand, and their numbers are true."""

import functools
import re

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import pages
from tests import test_utils

PAGES = ("start", "glossary", "coming_from", "index")
# The pages that run on 1 and on 2 devices.
PAGES_ON = {1: ("start",), 2: ("glossary",)}
OTHERS = ("coming_from", "index")

# What those do who forget something, on 2 devices.
FORGETFUL = (
    {"rows": 200, "batch_size": 8, "accum_steps": 8},
    {"rows": 200, "batch_size": 16, "accum_steps": 8},
    {"rows": 200, "batch_size": 24, "effective_batch_size": 64},
)

# Rows of coming_from.md, and the claims of conformance.md that they are of.
CLAIMS = {
    "micro-batches of 9, 9, 9 and 1 rows": (
        "Micro-batches of 9, 9, 9 and 1 rows"
    ),
    "masked tokens: 12, 3, 2 and 1 count": (
        "Masked tokens: 12, 3, 2 and 1 of 12 count"
    ),
    "masked tokens, none in one micro-batch": (
        "Masked tokens: none of a micro-batch count"
    ),
    "a loss that is a sum": "A loss that is a sum",
    "7 micro-batches in an epoch, k = 4": "7 micro-batches an epoch, k = 4",
    "7 micro-batches in an epoch, k = 16": "7 micro-batches an epoch, k = 16",
    "a learning-rate schedule": "A learning-rate schedule counts updates",
    "a moving average of the weights (`use_ema`): the averages": (
        "A moving average of the weights sees updates"
    ),
    "a constraint, such as `NonNeg`": "A constraint is applied after updates",
    "two devices": "Two replicas are one device",
    "two devices, masked tokens": (
        "Two replicas, masked tokens of uneven number"
    ),
    "two devices with XLA": "Compiled by XLA, two replicas",
    "the loss that an epoch reports, masked tokens": (
        "The loss that an epoch reports, masked tokens"
    ),
    "an L2 penalty beside a loss that is a sum": (
        "L2, with a sum: it counts once per update"
    ),
    "the moving mean of BatchNorm": (
        "Batch normalization: moving mean of the window's rows"
    ),
    "a window with a NaN is left out": "A window with a NaN can be left out",
}


def example_table(devices):
    """Returns the glossary's table of 1 or 2 devices: header and rows."""
    section = pages.text_of("glossary").split("### An example with numbers")[1]
    begin = section.index(f"On **{devices} device")
    found = re.search(r"^\|.*?\n\n", section[begin:], re.DOTALL | re.MULTILINE)
    return pages.table_rows(found.group())


def columns(devices):
    """Returns the arguments of each column of that table."""
    (_, *heads), *rows = example_table(devices)
    sizes = dict((name, cells) for name, *cells in rows)
    return [
        eval(f"dict({head.strip('`')})")
        | {"batch_size": int(size), "rows": 200}
        for head, size in zip(
            heads, sizes["`batch_size` of `fit`"], strict=True
        )
    ]


@functools.cache
def results(devices):
    """Returns what was printed and counted on a number of devices."""
    return pages.finish(
        pages.start(
            devices,
            {
                page: [code for code, _ in pages.blocks(page)]
                for page in PAGES_ON[devices]
            },
            pages.COUNT,
            columns=columns(devices) + (list(FORGETFUL) * (devices == 2)),
        )
    )


@functools.cache
def printed_by_others():
    """Returns what the pages printed that only the thorough tests run."""
    programs = {
        page: [code for code, _ in pages.blocks(page)] for page in OTHERS
    }
    (printed,) = pages.finish(pages.start(1, programs))
    return printed


def figure(cell):
    """Returns a figure of conformance.md as it is written, or what failed."""
    cell = cell.replace("*", "").split("[")[0].strip()
    return {"error": "an error"}.get(cell, cell)


class PagesTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    @test_utils.first_command(second=(0,))
    def test_blocks_print_what_is_below_them(self, devices):
        self.check(PAGES_ON[devices], results(devices)[0])

    @pytest.mark.thorough
    def test_blocks_of_others_print_what_is_below_them(self):
        self.check(OTHERS, printed_by_others())

    def check(self, names, printed):
        for page in names:
            pairs = zip(pages.blocks(page), printed[page], strict=True)
            for (code, expected), actual in pairs:
                with self.subTest(page=page, code=code):
                    if expected:
                        self.assertEqual(
                            pages.comparable(actual), pages.comparable(expected)
                        )

    def test_pages_have_outputs(self):
        for page, outputs in zip(PAGES, (2, 1, 7, 0), strict=True):
            found = [expected for _, expected in pages.blocks(page) if expected]
            self.assertLen(found, outputs, page)

    @parameterized.product(page=PAGES)
    def test_links_exist(self, page):
        broken, local = pages.broken_links(page)
        self.assertNotEmpty(local)
        self.assertEqual(broken, [])


class NumbersTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    @test_utils.first_command(second=(0, 1))
    def test_glossary(self, devices):
        _, counted = results(devices)
        _, *rows = example_table(devices)
        self.assertGreater(len(rows), 5)
        for name, *cells in rows:
            with self.subTest(name):
                name = name.split(", ")[0]
                self.assertEqual(
                    [int(cell) for cell in cells],
                    [column[name] for column in counted[:3]],
                )
        for column in counted[:3]:
            # 200 = 3 x 64 + 8.
            self.assertEqual(column["last window"], 8)

    @pytest.mark.thorough
    def test_start_makes_4_updates(self):
        printed, _ = results(1)
        self.assertIn("4/4", printed["start"][2])

    @pytest.mark.thorough
    def test_forgetful(self):
        _, (*_, same, larger, refused) = results(2)
        self.assertEqual(same["micro-batch rows"], 4)
        self.assertEqual(same["effective batch size"], 64)
        self.assertEqual(larger["effective batch size"], 128)
        self.assertEqual(larger["updates per epoch"], 2)
        self.assertIn("must be a multiple", refused)

    @parameterized.parameters(
        ("## Keras's own", "Keras"),
        ("## gradient-accumulator", "gradient-accumulator"),
        ("## PyTorch Lightning", "Lightning"),
        ("## Hugging Face Accelerate", "Accelerate"),
        ("## optax", "optax.MultiSteps"),
    )
    def test_figures_are_those_of_conformance(self, heading, system):
        claims = pages.table_rows(pages.text_of("conformance"))
        head = next(row for row in claims if row[:2] == ["", "bound"])
        figures = {row[0]: row for row in claims if len(row) == len(head)}
        (_, section) = pages.text_of("coming_from").split(f"\n{heading}", 1)
        rows = [
            row
            for row in pages.table_rows(section.split("\n## ")[0])
            if row[0] in CLAIMS
        ]
        self.assertGreater(len(rows), 1)
        for name, theirs, ours, _ in rows:
            with self.subTest(name):
                row = figures[CLAIMS[name]]
                expected = figure(row[head.index(system)])
                if theirs.endswith((" %", " % off")):
                    shown = float(theirs.split(" %")[0])
                    # A page is not written again for another digit.
                    self.assertAlmostEqual(
                        shown, 100 * float(expected), delta=5
                    )
                else:
                    self.assertEqual(theirs, expected)
                for way in ("`accum_steps`", "`microbatch_size`"):
                    cell = row[head.index(f"keras_accum, {way}")]
                    self.assertLess(float(cell), 1e-4)
                self.assertEqual(ours, "0 %")


if __name__ == "__main__":
    absltest.main()
