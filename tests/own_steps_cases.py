"""Models with a `train_step` of their own, for the tests of such steps."""

import keras
import numpy as np
import tensorflow as tf

import keras_accum
from tests import test_utils

FEATURES, NOISE = 6, 4


def network(inputs, outputs, seed):
    """A small network; the same weights for the same seed."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(outputs),
        ]
    )


class Networks(keras.Model):
    """The two networks of a GAN, as in Keras's guide."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = network(NOISE, FEATURES, 1)
        self.discriminator = network(FEATURES, 1, 2)
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    def compile(self, d_optimizer, g_optimizer, **kwargs):
        super().compile(**kwargs)
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def train_step(self, data):
        real, noise, *_ = data
        with tf.GradientTape() as tape:
            fake = self.generator(noise)
            loss = self.discriminator_loss(real, fake)
            d_loss = self.d_optimizer.scale_loss(loss)
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.update_by(
            self.d_optimizer,
            gradients,
            self.discriminator.trainable_weights,
            tf.shape(real)[0],
        )
        with tf.GradientTape() as tape:
            logits = self.discriminator(self.generator(noise))
            g_loss = self.loss_fn(tf.zeros_like(logits), logits)
            g_loss = self.g_optimizer.scale_loss(g_loss)
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.update_by(
            self.g_optimizer,
            gradients,
            self.generator.trainable_weights,
            tf.shape(noise)[0],
        )
        return {"d_loss": loss}

    def discriminator_loss(self, real, fake):
        logits = self.discriminator(tf.concat([fake, real], axis=0))
        ones = tf.ones_like(logits[: tf.shape(fake)[0]])
        zeros = tf.zeros_like(logits[tf.shape(fake)[0] :])
        return self.loss_fn(tf.concat([ones, zeros], axis=0), logits)


class AtOnce(Networks):
    """A GAN that makes both updates of the same weights, as a window does."""

    def train_step(self, data):
        # Past Keras, which would track what is in it.
        object.__setattr__(self, "given", [])
        logs = super().train_step(data)
        for optimizer, gradients, variables in self.given:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return logs

    def update_by(self, optimizer, gradients, variables, rows):
        self.given.append((optimizer, gradients, variables))


class InTurn(Networks):
    """A GAN as Keras's guide has it: one update, and then the other."""

    def update_by(self, optimizer, gradients, variables, rows):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))


class GAN(keras_accum.GradientAccumulationMixin, Networks):
    """A GAN that accumulates."""

    def update_by(self, optimizer, gradients, variables, rows):
        self.accumulate(
            zip(gradients, variables, strict=True), rows, optimizer=optimizer
        )


def gan_batches(sizes, seed=0):
    """Pairs of real rows and noise."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(size, FEATURES)).astype("float32"),
            rng.normal(size=(size, NOISE)).astype("float32"),
        )
        for size in sizes
    ]


def gan_optimizers(wrap=lambda optimizer: optimizer):
    """Two different ones, by the arguments of `compile`."""
    return {
        "d_optimizer": wrap(keras.optimizers.Adam(0.01, beta_1=0.5)),
        "g_optimizer": wrap(
            keras.optimizers.SGD(
                keras.optimizers.schedules.ExponentialDecay(0.2, 1, 0.5)
            )
        ),
    }


def trained_on(batches, wrap=lambda optimizer: optimizer):
    """The reference: one eager step for each batch; its first weights too."""
    model = AtOnce()
    model.compile(**gan_optimizers(wrap), run_eagerly=True)
    initial = model.get_weights()
    for batch in batches:
        model.train_step(batch)
    return model, initial


def trained_at_once(sizes, wrap=lambda optimizer: optimizer):
    """As `trained_on`, for windows of micro-batches of these sizes."""
    parts = iter(gan_batches([size for window in sizes for size in window]))
    windows = [[next(parts) for _ in window] for window in sizes]
    return trained_on(map(test_utils.concatenate, windows), wrap)
