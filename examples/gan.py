"""Trains two networks against each other, with a large batch and accumulated.

A generator makes images of digits from noise, and a discriminator tells them
from real ones (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661). Both
are updated from the same rows, so that a window has two models, two optimizers
and two `GradientAccumulator`s. The same loop runs a second time with the whole
batch at once. A table compares the two, and a picture shows what they draw.

    python -m examples.gan --accum_steps=8

The digits come with scikit-learn.
"""

import os
import pathlib
import sys

import numpy as np
from absl import app
from absl import flags
from absl import logging
from matplotlib import figure

if not __package__:  # `python examples/gan.py`
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent.parent))

from examples import picture_flag
from examples import silence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silence.silent_stderr():
    import keras
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from examples import digits_dataset
    from examples import gan_training

    tf.config.list_physical_devices()

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Where TFDS keeps its prepared sets.")
flags.DEFINE_integer("batch_size", 512, "Images per update.", lower_bound=1)
flags.DEFINE_integer(
    "accum_steps", 8, "Micro-batches per update.", lower_bound=1
)
flags.DEFINE_integer("updates", 400, "Of each network.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.002, "Adam's.", lower_bound=0.0)
flags.DEFINE_enum(
    "precision",
    "float64",
    ["float32", "float64"],
    "In float32, what rounding differs by grows to a tenth in 400 updates.",
)
flags.DEFINE_bool("jit_compile", False, "Whether XLA compiles the steps.")
flags.DEFINE_integer(
    "seed",
    0,
    "Decides the first weights, the images and the noise.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
picture_flag.define("gan.png")


@flags.multi_flags_validator(
    ["batch_size", "accum_steps"],
    message="--batch_size must not be less than --accum_steps.",
)
def _is_enough(values: dict[str, int]) -> bool:
    return values["batch_size"] >= values["accum_steps"]


def load_images(data_dir: str | None, dtype: str) -> np.ndarray:
    """Returns the digits to train on; `(number, SIDE * SIDE)`, from -1 to 1."""
    digits, _, _ = digits_dataset.open_dataset("digits", data_dir)
    images = np.stack([image for image, _ in digits.as_numpy_iterator()])
    return (images.reshape(len(images), -1) / 127.5 - 1).astype(dtype)


def draw(
    runs: dict[str, gan_training.Run], images: np.ndarray, path: str
) -> None:
    """Writes a picture: a row of real images, and one of each training's."""
    rows = {
        "real": images[: gan_training.DRAWN].reshape(
            -1, gan_training.SIDE, gan_training.SIDE
        )
    }
    rows |= {name: run.images for name, run in runs.items()}
    picture = figure.Figure(figsize=(8, 1.9), dpi=150, layout="constrained")
    axes = picture.subplots(len(rows))
    for each, (name, drawn) in zip(axes, rows.items(), strict=True):
        each.imshow(np.hstack(drawn), cmap="gray_r", vmin=-1, vmax=1)
        each.set(xticks=[], yticks=[])
        each.set_ylabel(name, rotation=0, ha="right", va="center")
        each.spines[:].set_visible(False)
    picture.savefig(path)


def main(argv: list[str]) -> None:
    """Trains both ways, prints the table and draws the picture."""
    if len(argv) > 1:
        sys.exit(f"Flags are written --name=value. Received: {argv[1]}")
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    keras.config.set_floatx(FLAGS.precision)
    images = load_images(FLAGS.data_dir, FLAGS.precision)
    runs = {
        name: gan_training.train(
            images,
            accum_steps,
            FLAGS.batch_size,
            FLAGS.updates,
            FLAGS.learning_rate,
            FLAGS.seed,
            FLAGS.jit_compile,
        )
        for name, accum_steps in (
            ("large batch", 1),
            ("accumulated", FLAGS.accum_steps),
        )
    }
    print(f"{'':<11}{'discriminator':>15}{'generator':>11}{'difference':>12}")
    for name, run in runs.items():
        pairs = zip(run.weights, runs["large batch"].weights, strict=True)
        apart = max(float(np.max(np.abs(a - b))) for a, b in pairs)
        print(
            f"{name:<11}{run.losses[0]:>15.4f}{run.losses[1]:>11.4f}"
            f"{apart:>12.2g}"
        )
    draw(runs, images, FLAGS.picture)
    print(f"\nLosses of the last update. Images: {FLAGS.picture}")


if __name__ == "__main__":
    app.run(main)
