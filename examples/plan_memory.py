r"""Says how many rows of a saved model fit in the memory, before any training.

    python -m examples.plan_memory --model=model.keras --rows=256
    python -m examples.plan_memory --model=model.keras --rows=256 \
        --memory_limit_mib=8192

It loads the model, which must be compiled, makes rows of random numbers in the
shapes of its inputs and outputs, and prints what `keras_accum.plan` finds. Rows
of other shapes than the model has are asked for with `--length`: an axis that
the model leaves open has that many entries. Integers are zeros, which every
vocabulary has.
"""

import os
import pathlib
import sys

import numpy as np
from absl import app
from absl import flags

if not __package__:  # `python examples/plan_memory.py`
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent.parent))

from examples import silence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silence.silent_stderr():
    import keras

    import keras_accum

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "The .keras file.", required=True)
flags.DEFINE_integer("rows", 256, "Rows of a batch.", lower_bound=1)
flags.DEFINE_integer(
    "length", 128, "Entries of an axis that the model leaves open.", 1
)
flags.DEFINE_integer(
    "memory_limit_mib",
    None,
    "Memory of each device; what there is if not given.",
    lower_bound=1,
)
flags.register_validator(
    "model",
    lambda name: pathlib.Path(name).is_file(),
    message="--model must name a file.",
)


def rows_like(tensors, rows: int, length: int):
    """Returns rows in the shapes of symbolic tensors, nested as these."""
    rng = np.random.default_rng(0)

    def like(tensor):
        shape = (rows, *(size or length for size in tensor.shape[1:]))
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "float" in dtype:
            return rng.uniform(size=shape).astype("float32")
        return np.zeros(shape, dtype)

    return keras.tree.map_structure(like, tensors)


def labels_for(model: keras.Model, x, rows: int, length: int):
    """Returns labels that the model's losses take: numbers, or classes.

    Raises:
        ValueError: If they take neither.
    """
    outputs = rows_like(model.outputs, rows, length)

    def as_classes(output):
        return np.zeros(output.shape[:-1], "int32")

    first = keras.tree.map_structure(lambda each: each[:1], (x, outputs))
    for make in (lambda output: output, as_classes):
        y, part = (
            keras.tree.map_structure(make, each) for each in (outputs, first[1])
        )
        if len(y) == 1:
            (y,), (part,) = y, part
        try:
            model.compute_loss(first[0], part, model(first[0]))
        except ValueError:
            continue
        return y
    raise ValueError(
        "No labels are known that the model's losses take. Call "
        "`keras_accum.plan(model, x, y)` with some of your own."
    )


def main(argv: list[str]) -> None:
    """Prints the plan."""
    if argv[1:]:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    model = keras.saving.load_model(FLAGS.model)
    if not model.compiled:
        sys.exit(
            f"{FLAGS.model} is not compiled. Call `model.compile` before "
            "`model.save`."
        )
    x = rows_like(model.inputs, FLAGS.rows, FLAGS.length)
    x = x[0] if len(x) == 1 else x
    y = labels_for(model, x, FLAGS.rows, FLAGS.length)
    limit = FLAGS.memory_limit_mib
    print(
        keras_accum.plan(
            model, x, y, memory_limit=None if limit is None else limit * 2**20
        )
    )


if __name__ == "__main__":
    app.run(main)
