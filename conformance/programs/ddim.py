"""Diffusion, with a teacher that follows the network's weights.

After https://keras.io/examples/generative/ddim/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

DECAY = 0.9


class DiffusionModel(keras.Model):
    # accum: class DiffusionModel(keras_accum.GradientAccumulationModel):
    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.normalizer = keras.layers.Normalization(axis=None)
        self.network = network
        self.ema_network = keras.models.clone_model(network)
        self.ema_network.set_weights(network.get_weights())
        self.noise_loss = keras.metrics.Mean(name="noise_loss")
        self.image_loss = keras.metrics.Mean(name="image_loss")

    @property
    def metrics(self):
        return [self.noise_loss, self.image_loss]

    def denoise(self, noisy, noise_rates, signal_rates, training):
        network = self.network if training else self.ema_network
        noises = network([noisy, noise_rates**2], training=training)
        return noises, (noisy - noise_rates * noises) / signal_rates

    def mix(self, data):
        images, noises, times = data
        images = self.normalizer(images)
        angles = 0.3 + 1.2 * times
        noise_rates, signal_rates = tf.sin(angles), tf.cos(angles)
        noisy = signal_rates * images + noise_rates * noises
        return images, noises, noisy, noise_rates, signal_rates

    def train_step(self, data):
        images, noises, *mixed = self.mix(data)
        with tf.GradientTape() as tape:
            some_noises, some_images = self.denoise(*mixed, training=True)
            noise_loss = self.loss(noises, some_noises)
        weights = self.network.trainable_weights
        gradients = tape.gradient(noise_loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights))
        # accum: self.accumulate(zip(gradients, weights), tf.shape(images)[0])
        self.noise_loss.update_state(noise_loss)
        self.image_loss.update_state(self.loss(images, some_images))
        self.follow()
        # accum:
        return {m.name: m.result() for m in self.metrics}

    # accum+: def update_step(self):
    # accum+:     super().update_step()
    # accum+:     self.follow()

    def follow(self):
        for theirs, mine in zip(self.network.weights, self.ema_network.weights):
            mine.assign(DECAY * mine + (1 - DECAY) * theirs)

    def test_step(self, data):
        images, noises, *mixed = self.mix(data)
        some_noises, some_images = self.denoise(*mixed, training=False)
        self.noise_loss.update_state(self.loss(noises, some_noises))
        self.image_loss.update_state(self.loss(images, some_images))
        return {m.name: m.result() for m in self.metrics}


def unet():
    noisy = keras.Input((8, 8, 1))
    variances = keras.Input((1, 1, 1))
    level = keras.ops.concatenate(
        [keras.ops.sin(6 * variances), keras.ops.cos(6 * variances)], axis=-1
    )
    level = keras.layers.UpSampling2D(8)(level)
    x = keras.layers.Conv2D(8, 1)(noisy)
    skip = x = keras.layers.Concatenate()([x, level])
    x = keras.layers.AveragePooling2D(2)(x)
    x = keras.layers.Conv2D(10, 3, padding="same", activation="swish")(x)
    x = keras.layers.UpSampling2D(interpolation="bilinear")(x)
    x = keras.layers.Concatenate()([x, skip])
    x = keras.layers.Conv2D(1, 1, kernel_initializer="zeros")(x)
    return keras.Model([noisy, variances], x)


def main(batch_size, epochs):
    rng = np.random.default_rng(0)
    images, _ = program_data.digits()
    noises = rng.normal(size=images.shape).astype("float32")
    times = rng.uniform(size=(64, 1, 1, 1)).astype("float32")
    model = DiffusionModel(unet())
    # accum: model = DiffusionModel(unet(), **ways)
    model.normalizer.adapt(images)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.MeanAbsoluteError(),
    )
    dataset = tf.data.Dataset.from_tensor_slices((images, noises, times))
    dataset = dataset.batch(batch_size)
    model.fit(dataset, epochs=epochs, validation_data=dataset, verbose=0)
    return model
