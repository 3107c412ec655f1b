"""What `plan` forecasts, and what training then takes.

    python -m benchmarks.memory_plan

For the three models of `benchmarks.compare_models`, with XLA and without, it
plans a batch, and then trains on it three times with some of the sizes, in
processes of their own. The table has the forecast total, the most bytes that
were asked for at any time, as TensorFlow's profiler saw it, the first over the
second, and the most that the allocator for the CPU had handed out for them, in
MiB. The allocator does not split every piece of memory, so that it may hand
out up to twice what it is asked for. The picture shows the totals over the
rows of a batch: of `keras.Model`, of micro-batches, with layers recomputed,
and both. It needs a CPU where TensorFlow uses oneDNN: it counts there.

`--page` writes the table to `docs/memory.md`. A run takes some ten minutes.
"""

import dataclasses
import json
import pathlib
import tempfile

import keras
import tensorflow as tf
from absl import app
from absl import flags
from matplotlib import figure
from tensorflow.tsl.profiler.protobuf import xplane_pb2

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
EPOCHS = 3
DEVICE = "CPU:0"
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


def peaks(training: Training) -> tuple[int, int]:
    """Trains; returns the most bytes asked for, and the most handed out."""
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            model = make(training, microbatch_size=training.microbatch_size)
            rows = ROWS[training.model]
            x, y = compare_models.CASES[training.model].batch(rows)
            model.fit(x, y, batch_size=rows, epochs=EPOCHS, verbose=0)
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        trace = xplane_pb2.XSpace.FromString(file.read_bytes())
    handed_out = tf.config.experimental.get_memory_info(DEVICE)["peak"]
    return most_asked_for(trace), handed_out


def most_asked_for(trace: xplane_pb2.XSpace) -> int:
    """Returns the most bytes of tensors that were there at the same time."""
    (plane,) = (each for each in trace.planes if each.name == "/host:CPU")
    events = []
    for line in plane.lines:
        for event in line.events:
            kind = plane.event_metadata[event.metadata_id].name
            if kind not in ("MemoryAllocation", "MemoryDeallocation"):
                continue
            values = {
                plane.stat_metadata[each.metadata_id].name: each.uint64_value
                or each.int64_value
                for each in event.stats
            }
            is_new = kind == "MemoryAllocation"
            time = line.timestamp_ns * 1000 + event.offset_ps
            size = values["requested_bytes"] if is_new else 0
            events.append((time, is_new, values["addr"], size))
    now, most, sizes = 0, 0, {}
    for _, is_new, address, size in sorted(events):
        now += size - sizes.pop(address, 0)
        if is_new:
            sizes[address] = size
        most = max(most, now)
    return most


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
        run = planned if training.microbatch_size is None else peaks
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
                asked_for, handed_out = processes.result_of(
                    MODULE, dataclasses.replace(training, microbatch_size=size)
                )
                lines.append(
                    [
                        f"{name}, {'with' if jit_compile else 'without'} XLA",
                        f"{size} of {rows}",
                        mib(found["total"]),
                        mib(asked_for),
                        f"{found['total'] / asked_for:.2f}",
                        mib(handed_out),
                    ]
                )
                print(*lines[-1], flush=True)
    table = memory_table.table(
        [
            "",
            "rows at once",
            "forecast, MiB",
            "asked for, MiB",
            "ratio",
            "handed out, MiB",
        ],
        lines,
    )
    print("\n".join(table))
    draw(compiled, _PICTURE.value)
    if flags.FLAGS.page:
        page = PAGE.read_text(encoding="utf-8")
        page = memory_table.with_table(page, "forecast", table)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
