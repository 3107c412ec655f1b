"""The how-to pages run as they stand, and print what is below their programs.

A `diff` is the program above it after the edit: what a reader runs then.
"""

import functools

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import pages
from tests import test_utils

PAGES = tuple(
    sorted(f"howto/{file.stem}" for file in (pages.DOCS / "howto").glob("*.md"))
)
# KerasHub's models take longest to trace.
SLOW = ("howto/kerashub_lora",)
DEVICES = "howto/two_gpus"
# What the two tables of that page are about, on 1 and on 2 devices.
SIZES = {
    1: (
        {"microbatch_size": 8, "batch_size": 64},
        {"accum_steps": 8, "batch_size": 8},
    ),
    2: (
        {"microbatch_size": 8, "batch_size": 64},
        {"accum_steps": 4, "batch_size": 16},
    ),
}
ROWS = 256

# Looks at the files that `saving` wrote.
LOOK = """
import numpy as np
import tensorflow as tf
import zipfile

names = spaces["howto/saving"]
expected = names["model"].predict(names["x"], verbose=0)
found = {"names our library": {}, "differs": {}}
for file in ("model.keras", "plain.keras"):
    config = zipfile.ZipFile(file).read("config.json").decode()
    found["names our library"][file] = "keras_accum" in config
for file in ("model.tflite", "converted.tflite"):
    interpreter = tf.lite.Interpreter(file)
    (taken,), (given_back,) = (
        interpreter.get_input_details(), interpreter.get_output_details()
    )
    interpreter.resize_tensor_input(taken["index"], names["x"].shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], names["x"])
    interpreter.invoke()
    outputs = interpreter.get_tensor(given_back["index"])
    found["differs"][file] = float(np.abs(outputs - expected).max())
print(json.dumps(found))
"""


@functools.cache
def results(devices, are_slow=False):
    """Returns what pages printed, and what else their process found."""
    slow = {True: SLOW, False: [page for page in PAGES if page not in SLOW]}
    # Its strategy is the one that is counted with.
    chosen = sorted(slow[are_slow], key=lambda page: page == DEVICES)
    if devices == 2:
        chosen = [DEVICES]
    more, given = "", {}
    if not are_slow:
        more, given = pages.COUNT, {"columns": columns(devices)}
    if not are_slow and devices == 1:
        more += LOOK
    process = pages.start(
        devices,
        {page: [code for code, _ in pages.programs(page)] for page in chosen},
        more,
        **given,
    )
    return pages.finish(process)


def columns(devices):
    return [{"rows": ROWS} | sizes for sizes in SIZES[devices]]


class PagesTest(parameterized.TestCase):
    def check(self, page, printed):
        with_output = 0
        for (code, expected), actual in zip(
            pages.programs(page), printed, strict=True
        ):
            with self.subTest(page=page, code=code):
                if expected is not None:
                    with_output += 1
                    self.assertTrue(
                        pages.is_alike(actual, expected), f"Printed: {actual}"
                    )
        self.assertGreater(with_output, 0, page)

    @parameterized.product(
        page=[page for page in PAGES if page not in SLOW],
    )
    @pytest.mark.thorough
    def test_programs_print_what_is_below_them(self, page):
        self.check(page, results(1)[0][page])

    @pytest.mark.thorough
    def test_two_devices(self):
        self.check(DEVICES, results(2)[0][DEVICES])

    @test_utils.at_night
    def test_slow_programs_print_what_is_below_them(self):
        for page in SLOW:
            self.check(page, results(1, are_slow=True)[0][page])

    @parameterized.product(page=PAGES)
    def test_links_exist(self, page):
        broken, local = pages.broken_links(page)
        self.assertNotEmpty(local)
        self.assertEqual(broken, [])

    @parameterized.parameters(1, 2)
    @test_utils.first_command(1)
    @pytest.mark.thorough
    def test_tables_of_two_gpus(self, devices):
        counted = results(devices)[1]
        text = pages.text_of(DEVICES).split("## What changes")[0]
        tables = []
        for row in pages.table_rows(text):
            if row[1:] == ["1 GPU", "2 GPUs"]:
                tables.append([])
            else:
                tables[-1].append(row)
        self.assertLen(tables, 2)
        for table, given, found in zip(
            tables, SIZES[devices], counted, strict=True
        ):
            self.assertGreater(len(table), 3)
            for name, *cells in table:
                with self.subTest(name):
                    wanted = found | {"`accum_steps`": given.get("accum_steps")}
                    self.assertEqual(int(cells[devices - 1]), wanted[name])

    @pytest.mark.thorough
    def test_files_of_saving(self):
        _, _, found = results(1)
        self.assertEqual(
            found["names our library"],
            {"model.keras": True, "plain.keras": False},
        )
        self.assertLen(found["differs"], 2)
        for file, difference in found["differs"].items():
            self.assertLess(difference, 1e-5, file)


class EditsTest(absltest.TestCase):
    def test_an_edit_takes_the_place_of_its_lines(self):
        code = "one\ntwo\nthree\nfour\n"
        diff = " one\n-two\n+2\n\n-four\n+4\n+5\n"
        self.assertEqual(pages.edited(code, diff), "one\n2\nthree\n4\n5\n")

    def test_an_edit_needs_its_lines_once(self):
        for code in ("two\n", "one\none\n"):
            with self.assertRaisesRegex(ValueError, "times"):
                pages.edited(code, "-one\n+1\n")

    def test_outputs_are_alike_but_for_times_and_last_digits(self):
        shown = "4/4 - 2s - 397ms/step - loss: 0.7015\n"
        self.assertTrue(
            pages.is_alike("4/4 - 11s - 1s/step - loss: 0.7016\n", shown)
        )
        for other in ("loss: 0.72", "loss: 0.7015 1", "4/8 - loss: 0.7015"):
            self.assertFalse(
                pages.is_alike(shown.replace("loss: 0.7015", other), shown)
            )


if __name__ == "__main__":
    absltest.main()
