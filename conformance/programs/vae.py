"""A variational autoencoder with a step of its own.

After https://keras.io/examples/generative/vae/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


class Sampling(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(
            keras.ops.shape(mean), seed=self.seed_generator
        )
        return mean + keras.ops.exp(0.5 * log_variance) * noise


class VAE(keras.Model):
    # accum: class VAE(keras_accum.GradientAccumulationModel):
    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.decoder = encoder, decoder
        self.reconstruction = keras.metrics.Mean(name="reconstruction")
        self.divergence = keras.metrics.Mean(name="divergence")

    def call(self, inputs):
        return self.decoder(self.encoder(inputs)[2])

    def train_step(self, data):
        with tf.GradientTape() as tape:
            mean, log_variance, code = self.encoder(data)
            errors = keras.losses.binary_crossentropy(data, self.decoder(code))
            reconstruction = tf.reduce_mean(tf.reduce_sum(errors, axis=(1, 2)))
            terms = 1 + log_variance - mean**2 - tf.exp(log_variance)
            divergence = -0.5 * tf.reduce_mean(tf.reduce_sum(terms, axis=1))
            loss = reconstruction + divergence
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights))
        # accum: self.accumulate(gradients, tf.shape(data)[0])
        self.reconstruction.update_state(reconstruction)
        self.divergence.update_state(divergence)
        return {
            "reconstruction": self.reconstruction.result(),
            "divergence": self.divergence.result(),
        }


def make():
    images = keras.Input((8, 8, 1))
    hidden = keras.layers.Conv2D(8, 3, 2, "same", activation="relu")(images)
    hidden = keras.layers.Flatten()(hidden)
    mean = keras.layers.Dense(2)(hidden)
    log_variance = keras.layers.Dense(2)(hidden)
    code = Sampling()([mean, log_variance])
    encoder = keras.Model(images, [mean, log_variance, code])
    decoder = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(4 * 4 * 8, activation="relu"),
            keras.layers.Reshape((4, 4, 8)),
            keras.layers.Conv2DTranspose(1, 3, 2, "same", activation="sigmoid"),
        ]
    )
    model = VAE(encoder, decoder)
    # accum: model = VAE(encoder, decoder, **ways)
    model.compile(keras.optimizers.Adam(1e-3))
    return model


def batch():
    images, _ = program_data.digits(16)
    return (images,)


def main(batch_size, epochs):
    model = make()
    images, _ = program_data.digits()
    model.fit(
        images, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0
    )
    return model
