"""What `plan` forecasts, and what training then takes.

    python -m benchmarks.memory_plan

For the three models of `benchmarks.compare_models`, with XLA and without, it
plans a batch, and then trains on three such batches with some of the sizes, in
processes of their own. The table has the forecast total, the most memory that
TensorFlow's allocator for the CPU had handed out at any time, in MiB, and the
first over the second. The picture shows the totals over the rows of a batch:
of `keras.Model`, of micro-batches, with layers recomputed, and both. It needs
a CPU where TensorFlow uses oneDNN: it counts there.

`--page` writes the table to `docs/memory.md`. A run takes some ten minutes.
"""

import dataclasses
import json

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags
from matplotlib import figure

import keras_accum
from benchmarks import compare_keras
from benchmarks import compare_models
from benchmarks import memory_table
from benchmarks import processes
from keras_accum import plan_table

MODULE = "benchmarks.memory_plan"
PAGE = processes.ROOT / "docs" / "memory.md"
# Rows of a batch, and of the micro-batches that are trained.
ROWS = {"MLP": 512, "transformer": 64, "convolutional": 256}
SHARES = (1, 4)
BATCHES = 3
# More than any size needs.
NO_LIMIT = 2**36

# `memory_table` defines `--page`.
_PICTURE = flags.DEFINE_string("picture", "memory_plan.png", "PNG to write.")


@dataclasses.dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        model: One of `compare_models.CASES`.
        jit_compile: Whether XLA compiles.
        microbatch_size: The argument; None to plan.
    """

    model: str
    jit_compile: bool
    microbatch_size: int | None = None


def make(training: Training, **arguments) -> keras.Model:
    """Returns a compiled model of the library."""
    inputs, outputs = compare_keras.NETWORKS[training.model]()
    model = keras_accum.GradientAccumulationModel(inputs, outputs, **arguments)
    model.compile(
        compare_keras.make_optimizer(
            compare_models.CASES[training.model].optimizer
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=training.jit_compile,
    )
    return model


def planned(training: Training) -> list[dict]:
    """Returns the sizes of a plan."""
    x, y = compare_models.CASES[training.model].batch(ROWS[training.model])
    found = keras_accum.plan(make(training), x, y, memory_limit=NO_LIMIT)
    return [
        dataclasses.asdict(each) | {"total": each.total} for each in found.sizes
    ]


def peak(training: Training) -> int:
    """Trains, and returns the most bytes that were handed out."""
    model = make(training, microbatch_size=training.microbatch_size)
    x, y = compare_models.CASES[training.model].batch(ROWS[training.model])
    x, y = (np.concatenate([each] * BATCHES) for each in (x, y))
    model.fit(x, y, batch_size=ROWS[training.model], verbose=0)
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]


def mib(size: float) -> str:
    """Writes bytes in MiB."""
    return f"{size / plan_table.MIB:,.0f}"


def draw(plans: dict[str, list[dict]], path: str) -> None:
    """Writes the picture.

    Args:
        plans: The sizes of each model, compiled by XLA.
        path: The PNG file to write.
    """
    picture = figure.Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    for axes, (name, sizes) in zip(
        picture.subplots(1, len(plans)), plans.items(), strict=True
    ):
        for recomputed, style in ((False, "-"), (True, "--")):
            some = [e for e in sizes if e["is_recomputed"] == recomputed]
            if not some:
                continue
            rows = [each["rows"] for each in some]
            word = ", recomputed" if recomputed else ""
            # `keras.Model` has no buffers.
            plain = [(e["total"] - e["buffers"]) / plan_table.MIB for e in some]
            axes.plot(rows, plain, style, color="#b5460f", label=f"whole{word}")
            small = some[2]
            ours = [
                (small["total"] - small["batch"] * (1 - row / rows[0]))
                / plan_table.MIB
                for row in rows
            ]
            axes.plot(
                rows,
                ours,
                style,
                color="#08519c",
                label=f"{small['rows']} at once{word}",
            )
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xlabel("rows in the batch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    picture.axes[0].set_ylabel("memory of training, MiB")
    picture.savefig(path)


def main(argv: list[str]) -> None:
    """Plans, trains, and prints the table; or does one of these."""
    if argv[1:]:
        training = Training(**json.loads(argv[1]))
        run = planned if training.microbatch_size is None else peak
        print(json.dumps(run(training)))
        return
    lines, compiled = [], {}
    for name, rows in ROWS.items():
        for jit_compile in (True, False):
            training = Training(name, jit_compile)
            sizes = processes.result_of(MODULE, training)
            if jit_compile:
                compiled[name] = sizes
            for share in SHARES:
                size = rows // share
                (found,) = (
                    each
                    for each in sizes
                    if each["rows"] == size and not each["is_recomputed"]
                )
                taken = processes.result_of(
                    MODULE, dataclasses.replace(training, microbatch_size=size)
                )
                lines.append(
                    [
                        f"{name}, {'with' if jit_compile else 'without'} XLA",
                        f"{size} of {rows}",
                        mib(found["total"]),
                        mib(taken),
                        f"{found['total'] / taken:.2f}",
                    ]
                )
                print(*lines[-1], flush=True)
    table = memory_table.table(
        ["", "rows at once", "forecast, MiB", "taken, MiB", "ratio"], lines
    )
    print("\n".join(table))
    draw(compiled, _PICTURE.value)
    if flags.FLAGS.page:
        page = PAGE.read_text(encoding="utf-8")
        page = memory_table.with_table(page, "forecast", table)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
