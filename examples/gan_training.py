"""The training of the GAN example: two networks, two optimizers, one window."""

import dataclasses
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

import keras_accum

SIDE, NOISE = 8, 16
# Images that a training draws at its end.
DRAWN = 16


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
    """Returns a network from noise to pixels from -1 to 1."""
    return keras.Sequential(
        [
            keras.Input((NOISE,)),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(SIDE * SIDE, activation="tanh"),
        ]
    )


def build_discriminator() -> keras.Model:
    """Returns a network from pixels to the logit that they are real."""
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
        """Adds the gradient of a loss that is a mean over `rows` rows."""
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
    """Yields batches of images and of noise, without end."""
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
            where the batch cannot be split evenly.
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
        split = [np.array_split(array, accum_steps) for array in next(data)]
        losses = [add(*microbatch) for microbatch in zip(*split, strict=True)]
        update()
    rows = [len(microbatch) for microbatch in split[0]]
    _, noise = next(batches(images, DRAWN, seed))
    drawn = generator.network(noise).numpy()
    return Run(
        weights=generator.network.get_weights()
        + discriminator.network.get_weights(),
        losses=tuple(np.average(losses, axis=0, weights=rows).tolist()),
        images=drawn.reshape(-1, SIDE, SIDE),
    )
