"""The page that `benchmarks.compare` writes, and its picture."""

import os
import pathlib
import platform
import statistics

import matplotlib

from benchmarks import compare_limits

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# What a window is compared with, in its own framework.
OTHERS = ("plain", "whole", "ideal")
# The rows of the tables: what accumulates, and in which process.
ROWS = {
    "keras_accum, `accum_steps`": ("keras_accum", "window"),
    "the same, `steps_per_execution=k`": ("keras_accum", "steps"),
    "keras_accum, `microbatch_size`": ("keras_accum", "cut"),
    "Keras": ("keras_accum", "keras"),
    "gradient-accumulator": ("gradient_accumulator", "window"),
    "optax.MultiSteps": ("multi_steps", "window"),
    "optax.microbatching": ("optax_microbatch", "window"),
    "PyTorch, loop": ("torch_loop", "window"),
    "Lightning": ("lightning", "window"),
    "Accelerate": ("accelerate", "window"),
}
FIRST_STEPS = (2, 8, 64)


def ratio(times, top: str, bottom: str) -> tuple[float, float, float]:
    """Returns the quartiles of a ratio: the lower, the median, the upper."""
    pairs = zip(times[top], times[bottom], strict=True)
    return tuple(statistics.quantiles([a / b for a, b in pairs], n=4))


def ratio_cell(quartiles) -> str:
    """Writes a ratio for the table: the median, and the middle half."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def percent(value: float) -> str:
    """Writes a ratio in words: "14 % less", "29 % more"."""
    word = "less" if value < 1 else "more"
    return f"{abs(100 * (value - 1)):.0f} % {word}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a Markdown table: first a column of text, then numbers."""
    return [
        line(head),
        line(["---", *["---:"] * (len(head) - 1)]),
        *map(line, rows),
    ]


def line(cells) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def time_table(results) -> list[str]:
    """Returns the table of times of a model."""
    times, rows = results["times"], []
    for title, (system, name) in ROWS.items():
        way = f"{system} {name}"
        if way in times:
            others = [f"{system} {other}" for other in OTHERS]
            ratios = [ratio(times, way, bottom) for bottom in others]
            ratios.append(ratio(times, way, "keras_accum window"))
            ratios.append(ratio(times, f"{system} plain", "keras_accum plain"))
            median = f"{1e3 * statistics.median(times[way]):.1f}"
            rows.append([title, median, *map(ratio_cell, ratios)])
    return table(
        [
            "",
            "ms per window",
            "/ k plain steps",
            "/ one step of the whole",
            "/ its ideal",
            "/ `accum_steps`",
            "k plain steps / Keras's",
        ],
        rows,
    )


def other_table(results) -> list[str]:
    """Returns the table of memory, first steps and traces of a model."""
    rows = []
    for title in ROWS:
        if title in results["memory"]:
            memory = results["memory"][title]
            first = results["first"][title]
            medians = [statistics.median(first[str(k)]) for k in FIRST_STEPS]
            traces = results["traces"][title]
            rows.append(
                [
                    title,
                    f"{memory['window'] / 1e6:.0f}",
                    f"{(memory['window'] - memory['plain']) / 1e6:.0f}",
                    *(f"{median:.2f}" for median in medians),
                    f"{medians[-1] / medians[0]:.2f}",
                    "–" if traces is None else str(traces),
                ]
            )
    return table(
        [
            "",
            "peak, MB",
            "over plain, MB",
            *(f"first step, k = {k}, s" for k in FIRST_STEPS),
            "k = 64 / k = 2",
            "traces",
        ],
        rows,
    )


def best_of(results: dict[str, dict]) -> tuple[float, float]:
    """Returns the bytes and operations of the machine's best second."""
    machines = [result["ours"]["machine"] for result in results.values()]
    return tuple(
        max(machine[name] for machine in machines)
        for name in ("bytes", "operations")
    )


def limit_table(results: dict[str, dict]) -> list[str]:
    """Returns the table of floors on the machine that measured."""
    windows, rows = compare_limits.windows(), []
    for model, result in results.items():
        window = windows[model]
        floors = compare_limits.floors(window, *best_of(results))
        measured = [
            statistics.median(result["times"][f"keras_accum {name}"])
            for name in ("window", "cut")
        ]
        rows.append(
            [
                model,
                f"{window.transfers / 1e6:.0f}",
                f"{window.operations / 1e9:.1f}",
                *(f"{1e3 * seconds:.1f}" for seconds in floors),
                *(f"{seconds / max(floors):.2f}" for seconds in measured),
            ]
        )
    return table(
        [
            "",
            "MB",
            "10^9 operations",
            "floor of the bytes, ms",
            "floor of the operations, ms",
            "`accum_steps` / higher floor",
            "`microbatch_size` / higher floor",
        ],
        rows,
    )


def accelerator_table() -> list[str]:
    """Returns the table of floors on H200s, by arithmetic."""
    limits, rows = compare_limits, []
    for model, window in limits.windows().items():
        large = model == limits.LARGE
        floors = limits.floors(
            window,
            limits.H200_BYTES,
            limits.H200_BF16 if large else limits.H200_TF32,
        )
        one = max(floors)
        nvlink = limits.reduction(window, limits.GPUS, limits.NVLINK)
        ethernet = limits.reduction(window, limits.HOSTS, limits.ETHERNET)
        seconds = [
            *floors,
            one + nvlink,
            one + window.accum_steps * nvlink,
            one + nvlink + ethernet,
            one + window.accum_steps * (nvlink + ethernet),
        ]
        rows.append([model, *map(milliseconds, seconds)])
    gpus, hosts = limits.GPUS, limits.HOSTS
    return table(
        [
            "ms per window",
            "bytes",
            "operations",
            f"{gpus} GPUs",
            f"{gpus} GPUs, k reductions",
            f"{hosts} hosts",
            f"{hosts} hosts, k reductions",
        ],
        rows,
    )


def milliseconds(seconds: float) -> str:
    """Writes milliseconds in three digits, without powers of ten."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# The largest ratio in the picture. Bars that end beyond it say where.
WIDEST = 3.0


def draw(results: dict[str, dict], path: pathlib.Path) -> None:
    """Draws windows over k plain steps, and over ours; a column a model."""
    figure, axes = plt.subplots(
        2,
        len(results),
        figsize=(4 * len(results), 6.5),
        sharey=True,
        squeeze=False,
    )
    for column, (model, result) in enumerate(results.items()):
        axes[0, column].set_title(model)
        draw_ratios(
            axes[0, column],
            result["times"],
            lambda system: f"{system} plain",
            "window / k plain steps of the same framework",
        )
        draw_ratios(
            axes[1, column],
            result["times"],
            lambda system: "keras_accum window",
            "window / window of keras_accum, accum_steps",
        )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_ratios(axis, times, bottom, label) -> None:
    """Draws a bar for each row of the tables: medians, and middle halves."""
    shown = [
        (title, system, name)
        for title, (system, name) in reversed(ROWS.items())
        if f"{system} {name}" in times
    ]
    quartiles = [
        ratio(times, f"{system} {name}", bottom(system))
        for _, system, name in shown
    ]
    axis.barh(
        [title.replace("`", "") for title, _, _ in shown],
        [middle for _, middle, _ in quartiles],
        xerr=[
            [middle - low for low, middle, _ in quartiles],
            [high - middle for _, middle, high in quartiles],
        ],
        color=[
            "C0" if system == "keras_accum" and name != "keras" else "0.7"
            for _, system, name in shown
        ],
    )
    axis.set_xlim(0, WIDEST)
    for place, (_, middle, _) in enumerate(quartiles):
        if middle > WIDEST:
            axis.text(
                0.97 * WIDEST, place, f"{middle:.1f}", ha="right", va="center"
            )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel(label, fontsize=9)


INTRODUCTION = """\
# Performance

What accumulation costs on a CPU, in time and memory. `python -m
benchmarks.compare` measured it and wrote this page. Each system trains the
same three models from the same data. The processes take turns, and each uses
as many threads as there are cores.

- **MLP**: 8.9 million parameters, micro-batches of 4 rows, k = 8, Adam.
- **transformer**: decoder-only, 2.9 million parameters, 4 rows of 64 tokens, k
  = 8, AdamW.
- **convolutional**: 1.1 million parameters, with batch normalization, 8 images
  of 32 x 32, k = 4, SGD.

For each model there are two tables. The first has the time of a window: k
micro-batches and one update. The columns with "/" divide it by another time.
0.54 means 46 % less time, 1.59 means 59 % more. Each ratio is a median over
the rounds. The middle half of the rounds is in brackets.

| the time is divided by | what this is |
| --- | --- |
| k plain steps | one update for each micro-batch: no accumulation |
| one step of the whole | one update from all rows at once |
| its ideal | k gradients that are not stored, and one update |
| `accum_steps` | the window of keras_accum with `accum_steps` |

The first three use the same framework as the row. So the speed of the
framework does not count. "/ `accum_steps`" compares different frameworks, and
there it does count. The last column shows how much: it compares plain steps of
the two frameworks, without accumulation.

PyTorch is not compiled here; the other systems are. XLA on a CPU has slow
convolutions inside its own loops. This explains the time of
optax.microbatching on the convolutional network. It is also the reason why the
loop of keras_accum over micro-batches is outside of XLA there (`python -m
benchmarks.loop_forms`).

The second table has memory and the first step:

- **peak**: the peak memory of a process that trains only in this way. **over
  plain**: how much more this is than in a process with plain steps.
- **first step**: the time of the first step of a new model. A step is a
  micro-batch. It is a whole window with `steps_per_execution=k`, with
  `microbatch_size` and in optax.microbatching. So there the step does k times
  the work. It is the median of few: on a busy machine two runs may differ by
  half.
- **traces**: how often a change of k makes Python run through the model again,
  or JAX compile again.

![Times of windows, divided by k plain steps and by ours](performance.png)
"""


LIMIT = """\
## Where the limit is

How much must a window of k micro-batches move and compute, at the least? The
weights have P bytes in float32.

- Each micro-batch reads them twice: forward and backward.
- The first micro-batch writes P bytes of sums. Each further one reads and
  writes them.
- The update moves 7P bytes with Adam, and 3P bytes without moments.
- The operations are matrix products and convolutions: once forward, and twice
  as many backward.

[compare_limits.py](../benchmarks/compare_limits.py) counts them. It leaves out
activations. It also leaves out the cache of the processor. If the weights fit
into the cache, a model can be faster than the floor of its bytes.

The floors follow from the best that this machine does: {bytes:.1f} GB/s in a
sum of two long vectors, and {operations:.0f} * 10^9 operations a second in a
product of two matrices of 2048 by 2048.

{table}

The next table is the same by arithmetic, for three machines: one H200 ({hbm}
TB/s; {tf32:.0f} * 10^12 operations a second in TF32); {gpus} of them with
NVLink ({nvlink:.0f} GB/s each way); and {hosts} hosts with {gpus} each, and
400 Gbit/s of Ethernet for each host. Every GPU has its own micro-batches. The
GPUs add up P bytes in a ring, once per window, or k times without
accumulation. None of this time is hidden behind other work. {large} stands for
a model of a size that is trained on such machines: 1.4 billion parameters,
2048 tokens, 4 rows, k = 8, in bfloat16 with float32 sums ({bf16:.0f} * 10^12
operations a second). **None of this was measured**: there was no GPU to run it
on. Each time is the higher of the two floors, plus the time of the exchanges
between GPUs.

{arithmetic}
"""


def limit(results: dict[str, dict]) -> str:
    """Returns the section on limits."""
    limits = compare_limits
    bandwidth, speed = best_of(results)
    return LIMIT.format(
        bytes=bandwidth / 1e9,
        operations=speed / 1e9,
        table="\n".join(limit_table(results)),
        arithmetic="\n".join(accelerator_table()),
        hbm=limits.H200_BYTES / 1e12,
        tf32=limits.H200_TF32 / 1e12,
        bf16=limits.H200_BF16 / 1e12,
        nvlink=limits.NVLINK / 1e9,
        gpus=limits.GPUS,
        hosts=limits.HOSTS,
        large=limits.LARGE,
    )


def page(results: dict[str, dict], versions: dict[str, str]) -> str:
    """Returns the whole of `docs/performance.md`."""
    dates = sorted({result["date"] for result in results.values()})
    lines = [
        INTRODUCTION,
        f"Measured on {' to '.join(dates)}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}: "
        f"{'; '.join(versions.values())}.",
    ]
    for model, result in results.items():
        lines += ["", f"## {model}", "", *time_table(result)]
        lines += ["", *other_table(result), ""]
        if ours := result["ours"]:
            scratch, host = ours["scratch"], ours["host"]
            lines += [
                f"XLA plans {scratch['window'] / 1e6:.1f} MB of scratch memory "
                f"for a micro-batch with `accum_steps`, and "
                f"{scratch['plain'] / 1e6:.1f} MB for a plain step.",
                "",
                "For one micro-batch of an almost empty model, `fit` takes "
                f"{percent(host[1])} time than `keras.Model` (the middle half "
                f"of the rounds: {percent(host[0])} to {percent(host[2])}).",
            ]
    return "\n".join([*lines, "", limit(results)])
