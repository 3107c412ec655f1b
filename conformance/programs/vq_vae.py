"""An autoencoder with a codebook, whose losses a layer adds.

After https://keras.io/examples/generative/vq_vae/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


class VectorQuantizer(keras.layers.Layer):
    def __init__(self, entries, features, beta=0.25, **kwargs):
        super().__init__(**kwargs)
        self.entries, self.features, self.beta = entries, features, beta
        self.codebook = self.add_weight(
            name="codebook", shape=(features, entries), initializer="uniform"
        )

    def call(self, x):
        flat = tf.reshape(x, [-1, self.features])
        distances = (
            tf.reduce_sum(flat**2, axis=1, keepdims=True)
            + tf.reduce_sum(self.codebook**2, axis=0)
            - 2 * tf.matmul(flat, self.codebook)
        )
        chosen = tf.one_hot(tf.argmin(distances, axis=1), self.entries)
        quantized = tf.matmul(chosen, self.codebook, transpose_b=True)
        quantized = tf.reshape(quantized, tf.shape(x))
        commitment = tf.reduce_mean((tf.stop_gradient(quantized) - x) ** 2)
        codebook = tf.reduce_mean((quantized - tf.stop_gradient(x)) ** 2)
        self.add_loss(self.beta * commitment + codebook)
        return x + tf.stop_gradient(quantized - x)


class VQVAETrainer(keras.Model):
    # accum: class VQVAETrainer(keras_accum.GradientAccumulationModel):
    def __init__(self, vqvae, variance, **kwargs):
        super().__init__(**kwargs)
        self.vqvae, self.variance = vqvae, variance
        self.total = keras.metrics.Mean(name="loss")
        self.reconstruction = keras.metrics.Mean(name="reconstruction_loss")
        self.quantization = keras.metrics.Mean(name="vqvae_loss")

    @property
    def metrics(self):
        return [self.total, self.reconstruction, self.quantization]

    def train_step(self, x):
        with tf.GradientTape() as tape:
            y = self.vqvae(x)
            reconstruction = tf.reduce_mean((x - y) ** 2) / self.variance
            quantization = sum(self.vqvae.losses)
            total = reconstruction + quantization
        weights = self.vqvae.trainable_variables
        gradients = tape.gradient(total, weights)
        self.optimizer.apply_gradients(zip(gradients, weights))
        # accum: self.accumulate(zip(gradients, weights), tf.shape(x)[0])
        self.total.update_state(total)
        self.reconstruction.update_state(reconstruction)
        self.quantization.update_state(quantization)
        return {m.name: m.result() for m in self.metrics}


def get_vqvae(features=4, entries=8):
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, 2, "same", activation="relu")(inputs)
    x = keras.layers.Conv2D(features, 1, padding="same")(x)
    x = VectorQuantizer(entries, features)(x)
    x = keras.layers.Conv2DTranspose(8, 3, 2, "same", activation="relu")(x)
    outputs = keras.layers.Conv2DTranspose(1, 3, padding="same")(x)
    return keras.Model(inputs, outputs)


def main(batch_size, epochs):
    images, _ = program_data.digits()
    trainer = VQVAETrainer(get_vqvae(), np.var(images))
    # accum: trainer = VQVAETrainer(get_vqvae(), np.var(images), **ways)
    trainer.compile(optimizer=keras.optimizers.SGD(0.05))
    trainer.fit(
        images - 0.5,
        epochs=epochs,
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
    )
    return trainer
