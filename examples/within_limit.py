"""Trains a model within a memory limit that it does not fit in as it is.

    python -m examples.within_limit --limit_mib=256

Four processes, one after the other:

1. `keras.Model` trains under the limit, and dies of it.
2. `keras_accum.plan` says how many rows at once fit, and are fastest.
3. `GradientAccumulationModel` trains under the limit, with so many rows, and
   with its layers recomputed if the plan says so.
4. `keras.Model` trains without the limit.

Then the weights of the last two are compared. The limit is one on the address
space, beyond what the process has before the first batch: it needs Linux. The
plan gets a quarter of it: on a CPU, TensorFlow's allocator asks the system for
regions, each twice as large as the one before, and hands out pieces of these.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from absl import app
from absl import flags

if not __package__:  # `python examples/within_limit.py`
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent.parent))

from examples import silence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silence.silent_stderr():
    import keras

    import keras_accum

LENGTH, UNITS, LAYERS, CLASSES = 512, 16, 24, 10
UPDATES = 4
ALL = ("keras", "plan", "micro-batches", "unlimited")
# For the plan, of the limit.
SHARE = 1 / 4

FLAGS = flags.FLAGS

flags.DEFINE_integer("batch_size", 1024, "Rows of an update.", lower_bound=2)
flags.DEFINE_integer("limit_mib", 256, "The limit.", lower_bound=1)
flags.DEFINE_enum("part", None, ALL, "The one to run in this process.")
flags.DEFINE_integer("microbatch_size", None, "For the third.", lower_bound=1)
flags.DEFINE_list("recomputed", [], "For the third: names of layers.")


def make() -> keras.Model:
    """Returns a model of few weights, with 0.8 MB of activations a row."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH, 1))
    hidden = inputs
    for _ in range(LAYERS):
        hidden = keras.layers.Dense(UNITS, activation="tanh")(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns sounds, to be told by how loud they are."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, FLAGS.batch_size)
    x = rng.normal(size=(FLAGS.batch_size, LENGTH, 1)) / (1 + y[:, None, None])
    return x.astype("float32"), y


def limit_address_space() -> None:
    """Allows this process so much more than it has."""
    # Windows has no such module.
    import resource

    status = pathlib.Path("/proc/self/statm").read_text(encoding="utf-8")
    now = int(status.split()[0]) * resource.getpagesize()
    limit = now + FLAGS.limit_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def train(model: keras.Model, is_limited: bool) -> dict:
    """Trains, and returns the weights and the losses."""
    x, y = batch()
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    start = [variable.numpy() for variable in variables]
    # Starts threads and traces the steps: of that the limit says nothing.
    model.train_on_batch(x[:2], y[:2])
    for variable, value in zip(variables, start, strict=True):
        variable.assign(value)
    if is_limited:
        limit_address_space()
    losses = [float(model.train_on_batch(x, y)) for _ in range(UPDATES)]
    weights = np.concatenate([each.ravel() for each in model.get_weights()])
    return {"losses": losses, "weights": weights.tolist()}


def run_part() -> dict:
    """Does in this process what `--part` says."""
    model = make()
    if FLAGS.part == "plan":
        x, y = batch()
        limit = int(SHARE * FLAGS.limit_mib * 2**20)
        found = keras_accum.plan(model, x, y, memory_limit=limit)
        best = found.best
        return {
            "table": str(found),
            "rows": best and best.rows,
            "recomputed": found.layers if best and best.is_recomputed else (),
        }
    if FLAGS.part == "micro-batches":
        keras_accum.rematerialize(model, FLAGS.recomputed)
        model = keras_accum.GradientAccumulationModel.from_model(
            model, microbatch_size=FLAGS.microbatch_size
        )
    return train(model, is_limited=FLAGS.part != "unlimited")


def in_process(part: str, *arguments: str) -> dict | None:
    """Runs a part in a process of its own; returns None if that died."""
    command = [
        sys.executable,
        "-m",
        "examples.within_limit",
        f"--part={part}",
        f"--batch_size={FLAGS.batch_size}",
        f"--limit_mib={FLAGS.limit_mib}",
        *arguments,
    ]
    root = pathlib.Path(__file__).absolute().parent.parent
    finished = subprocess.run(
        command,
        cwd=root,
        # By default the C library reserves 64 MiB of addresses for a thread.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        said = [each for each in finished.stderr.splitlines() if each.strip()]
        print(f"{part}: died. {said[-1][:200] if said else ''}", flush=True)
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    """Runs the four parts, and compares."""
    if argv[1:]:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    if FLAGS.part:
        print(json.dumps(run_part()))
        return
    if sys.platform != "linux":
        sys.exit("It needs Linux: other systems do not hold to the limit.")
    print(f"{FLAGS.batch_size} rows, {FLAGS.limit_mib} MiB.")
    if in_process("keras"):
        sys.exit("keras.Model did not die: lower --limit_mib.")
    plan = in_process("plan") or {"rows": None}
    print(plan.get("table", ""), flush=True)
    if plan["rows"] is None:
        sys.exit("Nothing fits: raise --limit_mib.")
    ours = in_process(
        "micro-batches",
        f"--microbatch_size={plan['rows']}",
        f"--recomputed={','.join(plan['recomputed'])}",
    )
    whole = in_process("unlimited")
    if ours is None or whole is None:
        sys.exit("It did not fit.")
    for name, each in (("micro-batches", ours), ("unlimited", whole)):
        losses = ", ".join(f"{loss:.6f}" for loss in each["losses"])
        print(f"{name}: losses {losses}")
    distance = np.abs(np.subtract(ours["weights"], whole["weights"])).max()
    print(f"Weights differ by at most {distance:.1e}.")


if __name__ == "__main__":
    app.run(main)
