"""Trains two networks against each other, with a large batch and accumulated.

A generator makes images of digits from noise, and a discriminator tells them
from real ones (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661). Both
are updated from the same rows, so that a window has two models, two optimizers
and two `GradientAccumulator`s. The same loop runs a second time with the whole
batch at once. A table compares the two, and a picture shows what they draw.

    python -m examples.gan --accum_steps=8

The digits come with scikit-learn.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from absl import app
from absl import flags
from absl import logging
from matplotlib import figure

if not __package__:  # `python examples/gan.py`
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent.parent))

from examples import silence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silence.silent_stderr():
    import keras
    import tensorflow as tf
    import tensorflow_datasets as tfds

    import keras_accum
    from examples import digits_dataset

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
flags.DEFINE_string("picture", "gan.png", "The PNG file to write.")

SIDE, NOISE = 8, 16
# Images in the picture, of each training.
DRAWN = 16


@flags.multi_flags_validator(
    ["batch_size", "accum_steps"],
    message="--batch_size must not be less than --accum_steps.",
)
def _is_enough(values: dict[str, int]) -> bool:
    return values["batch_size"] >= values["accum_steps"]


@flags.validator(
    "picture",
    message="--picture must name a .png file in a folder that exists and may be"
    " written to.",
)
def _is_writable_png(name: str) -> bool:
    path = pathlib.Path(name)
    written_to = path if path.is_file() else path.parent
    return (
        path.suffix == ".png"
        and not path.is_dir()
        and os.access(written_to, os.W_OK)
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training leaves.

    Attributes:
        weights: Of both networks.
        losses: Of the discriminator and the generator, in the last update.
        images: What the generator draws; `(DRAWN, SIDE, SIDE)`.
    """

    weights: list[np.ndarray]
    losses: tuple[float, float]
    images: np.ndarray


def build_generator() -> keras.Model:
    """A network from noise to pixels from -1 to 1."""
    return keras.Sequential(
        [
            keras.Input((NOISE,)),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(SIDE * SIDE, activation="tanh"),
        ]
    )


def build_discriminator() -> keras.Model:
    """A network from pixels to the logit of their being real."""
    return keras.Sequential(
        [
            keras.Input((SIDE * SIDE,)),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(1),
        ]
    )


class Player:
    """A network with its optimizer, and what is gathered for it.

    Args:
        network: The network.
        learning_rate: Adam's.
    """

    def __init__(self, network: keras.Model, learning_rate: float) -> None:
        self.network = network
        self._variables = network.trainable_variables
        self._optimizer = keras.optimizers.Adam(learning_rate, beta_1=0.5)
        self._optimizer.build(self._variables)
        self._accumulator = keras_accum.GradientAccumulator(self._variables)

    def add(self, tape: tf.GradientTape, loss: tf.Tensor, rows: int) -> None:
        """Adds the gradient of a mean loss over so many rows."""
        gradients = tape.gradient(loss, self._variables)
        self._accumulator.add(gradients, weight=rows)

    def update(self) -> None:
        """Makes an update of what was gathered."""
        self._optimizer.apply(self._accumulator.mean(), self._variables)
        self._accumulator.reset()


def add_microbatch(
    generator: Player,
    discriminator: Player,
    images: tf.Tensor,
    noise: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds the gradients of both losses; returns the losses."""
    loss_of = keras.losses.BinaryCrossentropy(from_logits=True)
    rows = tf.shape(images)[0]
    with tf.GradientTape(persistent=True) as tape:
        drawn = generator.network(noise, training=True)
        real = discriminator.network(images, training=True)
        fake = discriminator.network(drawn, training=True)
        discriminator_loss = 0.5 * (
            loss_of(tf.ones_like(real), real)
            + loss_of(tf.zeros_like(fake), fake)
        )
        generator_loss = loss_of(tf.ones_like(fake), fake)
    discriminator.add(tape, discriminator_loss, rows)
    generator.add(tape, generator_loss, rows)
    return discriminator_loss, generator_loss


def batches(
    images: np.ndarray, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of images and of noise."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(images), batch_size)
        noise = rng.normal(size=(batch_size, NOISE))
        yield images[rows], noise.astype(images.dtype)


def train(
    images: np.ndarray,
    accum_steps: int,
    batch_size: int,
    updates: int,
    learning_rate: float,
    seed: int,
    jit_compile: bool = False,
) -> Run:
    """Trains both networks once.

    Args:
        images: Real ones; `(number, SIDE * SIDE)`, from -1 to 1.
        accum_steps: Micro-batches per update. They differ by a row in size
            where the batch cannot be cut evenly.
        batch_size: Images per update.
        updates: Of each network.
        learning_rate: Adam's.
        seed: Decides the first weights, the images and the noise.
        jit_compile: Whether XLA compiles the steps.
    """
    keras.utils.set_random_seed(seed)
    generator, discriminator = (
        Player(build(), learning_rate)
        for build in (build_generator, build_discriminator)
    )

    # A function for each: of one, XLA's program would carry what the other
    # needs.
    @tf.function(jit_compile=jit_compile)
    def add(images, noise):
        return add_microbatch(generator, discriminator, images, noise)

    @tf.function(jit_compile=jit_compile)
    def update():
        generator.update()
        discriminator.update()

    data = batches(images, batch_size, seed)
    for _ in range(updates):
        parts = [np.array_split(part, accum_steps) for part in next(data)]
        losses = [add(*microbatch) for microbatch in zip(*parts, strict=True)]
        update()
    rows = [len(part) for part in parts[0]]
    _, noise = next(batches(images, DRAWN, seed))
    drawn = generator.network(noise).numpy()
    return Run(
        weights=generator.network.get_weights()
        + discriminator.network.get_weights(),
        losses=tuple(np.average(losses, axis=0, weights=rows).tolist()),
        images=drawn.reshape(-1, SIDE, SIDE),
    )


def load_images(data_dir: str | None, dtype: str) -> np.ndarray:
    """The digits to train on; `(number, SIDE * SIDE)`, from -1 to 1."""
    digits, _, _ = digits_dataset.open_dataset("digits", data_dir)
    images = np.stack([image for image, _ in digits.as_numpy_iterator()])
    return (images.reshape(len(images), -1) / 127.5 - 1).astype(dtype)


def draw(runs: dict[str, Run], images: np.ndarray, path: str) -> None:
    """Writes a picture: a row of real images, and one of each training's."""
    rows = {"real": images[:DRAWN].reshape(-1, SIDE, SIDE)}
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
        name: train(
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
