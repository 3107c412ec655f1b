"""Pages of documents: their programs, and what these print.

A page's programs run in a process of their own: TensorFlow splits the CPU once.
"""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).absolute().parent.parent
DOCS = ROOT / "docs"

# Runs the programs of each page in turn, and prints what each one printed.
RUN = """
import contextlib, io, json, sys
import tensorflow as tf

given = json.load(sys.stdin)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * given["devices"],
)
results, spaces = {}, {}
for page, programs in given["pages"].items():
    names = spaces[page] = {"__name__": page}
    results[page] = []
    for program in programs:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(program, page, "exec"), names)
        results[page].append(printed.getvalue())
print(json.dumps(results))
"""

# Counts what tables of batch sizes have, one `fit` for each column.
COUNT = """
import json
import keras, keras_accum
import numpy as np
import tensorflow as tf

rows = []


class Counting(keras_accum.GradientAccumulationModel):
    def train_step(self, data):
        rows.append(int(data[0].shape[0]))
        # No pass is needed to count, and these take less time.
        gradients = [tf.zeros_like(v) for v in self.trainable_weights]
        self.accumulate(gradients, rows[-1])
        return {}


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps, self.window = 0, None

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.window is None and self.model.optimizer.iterations.numpy():
            self.window = list(rows)


def counts(strategy, rows_of_data, batch_size, **arguments):
    rows.clear()
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(1)(inputs)
        model = Counting(inputs, outputs, **arguments)
        model.compile("sgd", "mse", run_eagerly=True)
    x, counting = np.zeros((rows_of_data, 4), "float32"), Steps()
    try:
        model.fit(
            x, x[:, :1], batch_size=batch_size, callbacks=[counting], verbose=0
        )
    except ValueError as error:
        return str(error)
    window = counting.window
    return {
        "`batch_size` of `fit`": batch_size,
        "micro-batch rows": max(rows),
        "micro-batches per window": len(window) / replicas,
        "micro-batches per window on one replica": len(window) / replicas,
        "rows per window per replica": sum(window) / replicas,
        "effective batch size": sum(window),
        "steps per epoch": counting.steps,
        "updates per epoch": int(model.optimizer.iterations.numpy()),
        "last window": sum(rows) % sum(window),
    }


# A page's own: with two of them TensorFlow fails, if models differ in size.
strategy = names.get("strategy") or tf.distribute.get_strategy()
found = []
for column in given["columns"]:
    found.append(counts(strategy, column.pop("rows"), **column))
print(json.dumps(found))
"""


@functools.cache
def text_of(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page):
    """Returns the Python of a page, each with the output below it or None."""
    return [
        (code, expected)
        for kind, code, expected in _fences(page)
        if kind == "python"
    ]


def programs(page):
    """Returns what a page runs, each with the output below it or None.

    A block of Python stands for itself, and a `diff` for the last program
    above it that has its lines, as it is after the edit.
    """
    found = []
    for kind, text, expected in _fences(page):
        if kind == "diff":
            text = next(
                edited(code, text)
                for code, _ in reversed(found)
                if all(old in code for old, _ in hunks(text))
            )
        found.append((text, expected))
    return found


def _fences(page):
    pattern = r"```(python|diff)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?"
    found = re.finditer(pattern, text_of(page), re.DOTALL)
    return [fence.groups() for fence in found]


def hunks(diff):
    """Returns pairs of the lines that a diff replaces, and the new ones.

    Empty lines are between the pairs.
    """
    pairs = []
    for hunk in re.split(r"\n{2,}", diff.strip("\n")):
        lines = [(line[0], f"{line[1:]}\n") for line in hunk.split("\n")]
        pairs.append(
            tuple(
                "".join(text for sign, text in lines if sign != skipped)
                for skipped in "+-"
            )
        )
    return pairs


def edited(code, diff):
    """Returns a program with a diff's lines in the place of its own."""
    for old, new in hunks(diff):
        if code.count(old) != 1:
            raise ValueError(f"Found {code.count(old)} times:\n{old}")
        code = code.replace(old, new)
    return code


def start(devices, pages, more="", **given):
    """Starts a process that runs pages, in a folder that has no files.

    Args:
        devices: How many devices the process has.
        pages: The programs of each page, by its name.
        more: Python to run after the pages. It has `given`.
        **given: What else it gets, as JSON.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    folder = tempfile.TemporaryDirectory()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN + more],
        env=os.environ | {"PYTHONPATH": path},
        cwd=folder.name,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    wanted = {"devices": devices, "pages": pages, **given}
    process.stdin.write(json.dumps(wanted))
    process.stdin.close()
    process.stdin = None
    process.folder = folder
    return process


def finish(process):
    """Returns the lines that a process of `start` printed, each from JSON."""
    with process.folder:
        out, err = process.communicate()
    if process.returncode:
        raise AssertionError(err)
    return [json.loads(line) for line in out.splitlines()]


def comparable(printed):
    """Returns lines in an order that rounding does not change."""
    rounding = re.compile(r"\b\d\.\de-(0[789]|1\d)|\b0\.0e\+00")
    return sorted(rounding.sub("rounding", printed).split("\n"))


def is_alike(actual, expected):
    """Returns whether two outputs differ in times and last digits alone."""
    time = re.compile(r"\b\d+m?s\b")
    decimal = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
    texts = [time.sub("time", each) for each in (actual, expected)]
    words = [decimal.split(text) for text in texts]
    numbers = [map(float, decimal.findall(text)) for text in texts]
    return words[0] == words[1] and all(
        math.isclose(*pair, rel_tol=0.01) for pair in zip(*numbers, strict=True)
    )


def table_rows(text):
    """Returns the cells of the lines of Markdown tables, but for rulers."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    ]
    return [row for row in cells if not set("".join(row)) <= set(":- ")]


def broken_links(page):
    """Returns a page's links into the repository that lead nowhere; and all."""
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    local = [link for link in links if "://" not in link]
    here = DOCS / f"{page}.md"
    broken = []
    for link in local:
        name, _, anchor = link.partition("#")
        file = here.parent / name if name else here
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    return broken, local


def anchors(file):
    """Returns what links to a page may have behind `#`."""
    text = file.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return [
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    ]
