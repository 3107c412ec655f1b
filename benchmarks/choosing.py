"""Time and memory of a batch, by how many of its rows are taken at once.

    python -m benchmarks.choosing

An image classifier, most of whose memory is what its layers keep for the
backward pass, trains on batches of 64, 256 and 1024 rows: whole, as a
`keras.Model`, and with `microbatch_size`.

* Memory: the peak of a process of its own for each, over what it had used once
  all was imported and built. The images, the buffers, XLA's compiler and
  whatever the allocator keeps are included.
* Seconds: of one batch with its update. All ways to train on a batch take
  turns in one process, so that a busy machine slows them alike. The figures to
  quote are the medians over the rounds of the ratios: to the whole batch, and
  to `accum_steps` with micro-batches as large.

`--picture` draws the first ratios and the memory.

What came of it, with TensorFlow 2.21.0 and Keras 3.15.1, on two cores that had
other work, in 11 minutes:

    XLA  batch  at once     MiB  seconds  / whole  / accum_steps
    off     64       16      66    0.075     1.18           0.90
    off     64       64     107    0.065     1.00
    off    256       16      68    0.294     1.23           0.86
    off    256       64     122    0.219     0.99           0.95
    off    256      256     328    0.247     1.00
    off   1024       16      78    1.123     1.20           0.73
    off   1024       64     135    0.990     1.07           1.14
    off   1024      256     348    0.918     0.89           1.25
    off   1024     1024    1114    0.937     1.00
    on      64       16     201    0.112     0.99           0.92
    on      64       64     242    0.107     1.00
    on     256       16     194    0.397     1.04           0.94
    on     256       64     238    0.381     0.99           1.03
    on     256      256     440    0.390     1.00
    on    1024       16     227    1.641     0.91           0.95
    on    1024       64     276    1.680     0.90           0.97
    on    1024      256     489    1.676     0.85           0.96
    on    1024     1024    1283    1.802     1.00

So few rounds are good to 0.2, at best. Without XLA, the ratios of 1024 rows to
the whole were 0.78, 0.59 and 0.73 in another run, and 1.15, 1.01 and 0.96 in
a third. The one of 1024 by 256 to `accum_steps` was 1.12 and 1.11 in these, and
in 25 rounds 1.01 (middle half 0.95 to 1.13); 256 by 64 in 41 rounds, 0.95 (0.88
to 1.00); 1024 by 256 with XLA in 12 rounds, 0.99 (0.93 to 1.07).
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags
from matplotlib import figure
from matplotlib import lines
from matplotlib import ticker

import keras_accum
from benchmarks import window_time

IMAGE = (32, 32, 3)
LAYERS, FILTERS, CLASSES = 4, 16, 10
# Rows of a batch, and how many rounds are timed.
ROUNDS = {64: 15, 256: 9, 1024: 5}
COLORS = {64: "#74a9cf", 256: "#ef8a62", 1024: "#08306b"}
SIZES = (16, 64, 256)

_PICTURE = flags.DEFINE_string("picture", None, "The PNG file to write.")


class Way(NamedTuple):
    """A way to train on a batch.

    Attributes:
        rows: Rows of the batch.
        size: How many of them are taken at once.
        jit_compile: Whether XLA compiles.
        how: Argument that says so; None for a plain `keras.Model`.
    """

    rows: int
    size: int
    jit_compile: bool
    how: str | None = "microbatch_size"

    @property
    def steps(self) -> int:
        """Calls of the train function for one batch."""
        return self.rows // self.size if self.how == "accum_steps" else 1


def build(way: Way) -> keras.Model:
    """Returns a classifier of images: few weights, large activations."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(IMAGE)
    hidden = inputs
    for _ in range(LAYERS):
        hidden = keras.layers.Conv2D(
            FILTERS, 3, padding="same", activation="gelu"
        )(hidden)
    hidden = keras.layers.AveragePooling2D(4)(hidden)
    hidden = keras.layers.Flatten()(hidden)
    outputs = keras.layers.Dense(CLASSES)(hidden)
    if way.how is None:
        model = keras.Model(inputs, outputs)
    else:
        value = way.size if way.how == "microbatch_size" else way.steps
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, **{way.how: value}
        )
    return window_time.compile_model(model, jit_compile=way.jit_compile)


def training(way: Way, model: keras.Model) -> Callable[[], None]:
    """Returns a function that trains on one batch, as `fit` does."""
    model.make_train_function()
    rows = way.rows // way.steps
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, *IMAGE), "float32")
    y = rng.integers(0, CLASSES, rows)
    batches = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    iterator = iter(batches)

    def run():
        for _ in range(way.steps):
            logs = model.train_function(iterator)
        # Some of the work may still be under way.
        float(logs["loss"])

    return run


def peak_mib() -> float:
    """Returns the most memory that this process has had resident."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def memory(way: Way) -> float:
    """Returns the MiB that this process needs to train, over what it had."""
    model = build(way)
    before = peak_mib()
    run = training(way, model)
    for _ in range(2):
        run()
    return peak_mib() - before


def memories(ways: list[Way]) -> list[float]:
    """Measures the `memory` of each way, in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
    ) as pool:
        return list(pool.map(memory, ways))


def sizes_of(rows: int) -> list[int]:
    """Returns how many rows to take at once; last of all the whole batch."""
    return [size for size in SIZES if size < rows] + [rows]


def way_of(rows: int, size: int, jit_compile: bool) -> Way:
    """Returns a plain `keras.Model` for the whole batch, else micro-batches."""
    how = None if size == rows else "microbatch_size"
    return Way(rows, size, jit_compile, how)


def times_of(rows: int, jit_compile: bool) -> dict[Way, list[float]]:
    """Returns the seconds of each way to train on a batch in each round."""
    ways = [way_of(rows, size, jit_compile) for size in sizes_of(rows)]
    ways += [way._replace(how="accum_steps") for way in ways if way.how]
    functions = {way: training(way, build(way)) for way in ways}
    return window_time.in_turn(functions, ROUNDS[rows])


def median_ratio(times: dict[Way, list[float]], top: Way, bottom: Way) -> float:
    """Returns the median over the rounds of `top / bottom`."""
    pairs = zip(times[top], times[bottom], strict=True)
    return statistics.median(a / b for a, b in pairs)


def draw(
    memory_of: dict[Way, float], ratio_of: dict[Way, float], path: str
) -> None:
    """Draws time and memory over the rows that are taken at once."""
    picture = figure.Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    panels = picture.subplots(1, 2)
    for axes, values in zip(panels, (ratio_of, memory_of), strict=True):
        for rows, jit_compile in itertools.product(ROUNDS, (False, True)):
            ways = [way_of(rows, size, jit_compile) for size in sizes_of(rows)]
            axes.plot(
                [way.size for way in ways],
                [values[way] for way in ways],
                color=COLORS[rows],
                ls="--" if jit_compile else "-",
                marker="o",
                markevery=slice(0, -1),
                ms=5,
            )
            whole = ways[-1]
            axes.plot(
                whole.size, values[whole], "s", c=COLORS[rows], mfc="white"
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([*SIZES, max(ROUNDS)])
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.set_xlabel("rows at once")
        axes.grid(alpha=0.3, which="both")
    panels[0].set(title="time / that of the whole batch", ylim=(0, None))
    panels[1].set(title="memory, MiB", yscale="log", ylim=(20, None))
    panels[1].set_yticks([50, 100, 200, 500, 1000])
    panels[1].minorticks_off()
    panels[1].yaxis.set_major_formatter(ticker.ScalarFormatter())
    samples = [({"color": COLORS[rows]}, f"batch of {rows}") for rows in ROUNDS]
    samples += [
        ({"color": "gray", "ls": "--"}, "compiled by XLA"),
        ({"color": "gray", "ls": "", "marker": "s", "mfc": "white"}, "whole"),
    ]
    panels[0].legend(
        [lines.Line2D([], [], **style) for style, _ in samples],
        [label for _, label in samples],
        loc="lower left",
        fontsize="small",
    )
    picture.savefig(path)


def main(argv):
    """Prints the table, and draws it."""
    del argv
    if sys.platform != "linux":
        sys.exit("It needs Linux, whose processes say what memory they took.")
    grid = [
        way_of(rows, size, jit_compile)
        for jit_compile in (False, True)
        for rows in ROUNDS
        for size in sizes_of(rows)
    ]
    memory_of = dict(zip(grid, memories(grid), strict=True))
    measure = functools.cache(times_of)
    ratio_of = {}
    print(
        f"{'XLA':4}{'batch':>6}{'at once':>9}{'MiB':>8}{'seconds':>9}"
        f"{'/ whole':>9}{'/ accum_steps':>15}"
    )
    for way in grid:
        times = measure(way.rows, way.jit_compile)
        whole = way_of(way.rows, way.rows, way.jit_compile)
        ratio_of[way] = median_ratio(times, way, whole)
        line = (
            f"{'on' if way.jit_compile else 'off':4}{way.rows:6}{way.size:9}"
            f"{memory_of[way]:8.0f}{statistics.median(times[way]):9.3f}"
            f"{ratio_of[way]:9.2f}"
        )
        if way != whole:
            other = way._replace(how="accum_steps")
            line += f"{median_ratio(times, way, other):15.2f}"
        print(line, flush=True)
    if _PICTURE.value is not None:
        draw(memory_of, ratio_of, _PICTURE.value)


if __name__ == "__main__":
    app.run(main)
