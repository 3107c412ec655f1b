"""Trains an image classifier with a large batch and with accumulation.

Both trainings begin with the same weights and see the same images in the same
order. One updates with `--batch_size` images at once, the other accumulates
micro-batches for every update. A table at the end compares them, and a picture
shows the loss of each update in both.

    python -m examples.digits --accum_steps=8
    python -m examples.digits --microbatch_size=100

The first gives `fit` the micro-batches, `--accum_steps` for an update. The
second gives `fit` the same batches as the other training, and the model takes
`--microbatch_size` images at once, and what is left over. With `auto` it takes
as many as fit in the memory.

Each training has a process of its own, whose peak memory the table shows: it
includes the Python interpreter and TensorFlow, about 650 MiB together, and what
XLA needs for compiling with `--jit_compile`. The seconds are those of `fit`, in
which tracing and compiling are included.

The digits come with scikit-learn. `--dataset` takes any other image
classification set of TensorFlow Datasets instead, such as `mnist`.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import sys

import numpy as np
from absl import app
from absl import flags
from absl import logging
from matplotlib import figure

if not __package__:  # `python examples/digits.py`
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent.parent))

from examples import picture_flag
from examples import silence

# TensorFlow describes the machine when it is imported and when it looks for
# devices first; `TF_CPP_MIN_LOG_LEVEL` stops only what it says later.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silence.silent_stderr():
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from examples import digits_dataset
    from examples import digits_training

    tf.config.list_physical_devices()

# Not bfloat16 alone: Adam's `beta_2` of 0.999 is 1 in it, and nothing learns.
_PRECISIONS = ("float32", "float64", "mixed_bfloat16", "mixed_float16")

# Micro-batches per update if no flag says how the batch is split.
_ACCUM_STEPS = 8

FLAGS = flags.FLAGS

flags.DEFINE_string("dataset", "digits", "Image classification set of TFDS.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps its prepared sets.")
flags.DEFINE_integer("batch_size", 512, "Images per update.", lower_bound=1)
flags.DEFINE_integer(
    "accum_steps",
    None,
    f"Micro-batches per update; {_ACCUM_STEPS} unless there is"
    " --microbatch_size.",
    lower_bound=1,
)
flags.DEFINE_string(
    "microbatch_size",
    None,
    "Most images at once, instead of --accum_steps; or auto, for what fits.",
)
flags.DEFINE_integer("epochs", 20, "Passes over the images.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.006, "Adam's.", lower_bound=0.0)
flags.DEFINE_enum("precision", "float32", _PRECISIONS, "Keras dtype policy.")
flags.DEFINE_bool("jit_compile", False, "Whether XLA compiles the steps.")
flags.DEFINE_integer(
    "seed",
    0,
    "Decides the first weights and the order of the images.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
picture_flag.define("digits.png")


@flags.multi_flags_validator(
    ["accum_steps", "microbatch_size"],
    message="--accum_steps and --microbatch_size both say how to split a batch;"
    " give one of them.",
)
def _is_said_once(values: dict[str, int | str | None]) -> bool:
    return None in values.values()


@flags.validator(
    "microbatch_size",
    message="--microbatch_size must be a positive integer or auto.",
)
def _is_size(text: str | None) -> bool:
    if text in (None, "auto"):
        return True
    return text.isdecimal() and int(text) > 0


@flags.multi_flags_validator(
    ["batch_size", "accum_steps", "microbatch_size"],
    message="--batch_size must be a multiple of --accum_steps"
    f" ({_ACCUM_STEPS} by default), so that all micro-batches have one size."
    " --microbatch_size takes any.",
)
def _divides(values: dict[str, int | str | None]) -> bool:
    if values["microbatch_size"] is not None:
        return True
    steps = values["accum_steps"] or _ACCUM_STEPS
    return values["batch_size"] % steps == 0


def settings_from_flags() -> digits_training.Settings:
    """Returns settings, each field from the flag of its name."""
    values = {
        field.name: FLAGS[field.name].value
        for field in dataclasses.fields(digits_training.Settings)
    }
    if values["microbatch_size"] is None:
        values["accum_steps"] = values["accum_steps"] or _ACCUM_STEPS
    elif values["microbatch_size"] != "auto":
        values["microbatch_size"] = int(values["microbatch_size"])
    return digits_training.Settings(**values)


def heading(settings: digits_training.Settings) -> str:
    """Returns how the accumulated training takes the images of an update."""
    if settings.accum_steps is not None:
        return (
            f"{settings.accum_steps} micro-batches of {settings.step_size}"
            " images per update"
        )
    at_once = (
        "as many as fit"
        if settings.microbatch_size == "auto"
        else f"at most {settings.microbatch_size}"
    )
    return f"{settings.batch_size} images per update, {at_once} at once"


def train_in_own_process(
    settings: digits_training.Settings, accumulate: bool
) -> digits_training.Run:
    """Trains where no other training has left memory or state behind."""
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(digits_training.train, settings, accumulate).result()


def largest_difference(
    run: digits_training.Run, other: digits_training.Run
) -> float:
    """Returns the largest difference between weights; NaN if one is NaN."""
    pairs = zip(run.weights, other.weights, strict=True)
    return float(np.max([np.max(np.abs(a - b)) for a, b in pairs]))


def table(large: digits_training.Run, accumulated: digits_training.Run) -> str:
    """Returns the comparison, in lines of at most 80 columns."""
    lines = [
        f"{'':<11}{'updates':>9}{'test accuracy':>15}{'largest difference':>20}"
        f"{'peak memory':>13}{'seconds':>9}"
    ]
    for name, run in ("large batch", large), ("accumulated", accumulated):
        lines.append(
            f"{name:<11}{run.updates:>9,}{run.accuracy:>15.4f}"
            f"{largest_difference(run, large):>20.2g}"
            f"{f'{run.peak_mib:,.0f} MiB':>13}{run.seconds:>9.1f}"
        )
    return "\n".join(lines)


def draw_losses(
    large: digits_training.Run, accumulated: digits_training.Run, path: str
) -> None:
    """Writes a picture of both loss curves, the second inside the first."""
    picture = figure.Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = picture.add_subplot()
    for run, style in (
        (large, {"label": "large batch", "color": "#9ecae1", "lw": 6}),
        (accumulated, {"label": "accumulated", "color": "#08306b", "ls": "--"}),
    ):
        axes.semilogy(range(1, len(run.losses) + 1), run.losses, **style)
    axes.set(xlabel="update", ylabel="training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    picture.savefig(path)


def main(argv: list[str]) -> None:
    """Trains both ways, prints the table and draws the picture."""
    if len(argv) > 1:
        sys.exit(f"Flags are written --name=value. Received: {argv[1]}")
    # TFDS warns that what it is about to prepare has not been prepared.
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    settings = settings_from_flags()
    digits_dataset.open_dataset(settings.dataset, settings.data_dir)
    print(f"\nLarge batch: {settings.batch_size} images per update", flush=True)
    large = train_in_own_process(settings, accumulate=False)
    print(f"\nAccumulated: {heading(settings)}", flush=True)
    accumulated = train_in_own_process(settings, accumulate=True)
    draw_losses(large, accumulated, FLAGS.picture)
    print(f"\n{table(large, accumulated)}\n\nLoss curves: {FLAGS.picture}")


if __name__ == "__main__":
    app.run(main)
