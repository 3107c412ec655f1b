"""A critic with a penalty on its gradient, and a generator.

After https://keras.io/examples/generative/wgan_gp/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

CODE = 4


class WGAN(keras.Model):
    # accum: class WGAN(keras_accum.GradientAccumulationModel):
    def __init__(self, discriminator, generator, gp_weight=10.0, **kwargs):
        super().__init__(**kwargs)
        self.discriminator, self.generator = discriminator, generator
        self.gp_weight = gp_weight

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def gradient_penalty(self, real, fake, alpha):
        mixed = real + alpha * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(mixed)
            scores = self.discriminator(mixed, training=True)
        slopes = tape.gradient(scores, mixed)
        norms = tf.sqrt(tf.reduce_sum(tf.square(slopes), axis=[1, 2, 3]))
        return tf.reduce_mean((norms - 1.0) ** 2)

    def train_step(self, data):
        images, codes = data
        # accum+: rows = tf.shape(images)[0]
        alpha = tf.reshape(tf.sigmoid(codes[:, 0]), (-1, 1, 1, 1))
        with tf.GradientTape() as tape:
            fake = self.generator(codes, training=True)
            cost = tf.reduce_mean(self.discriminator(fake)) - tf.reduce_mean(
                self.discriminator(images)
            )
            penalty = self.gradient_penalty(images, fake, alpha)
            d_loss = cost + penalty * self.gp_weight
        d_gradients = tape.gradient(
            d_loss, self.discriminator.trainable_variables
        )
        with tf.GradientTape() as tape:
            fake = self.generator(codes, training=True)
            g_loss = -tf.reduce_mean(self.discriminator(fake))
        g_gradients = tape.gradient(g_loss, self.generator.trainable_variables)
        pairs = zip(d_gradients, self.discriminator.trainable_variables)
        self.d_optimizer.apply_gradients(pairs)
        # accum: self.accumulate(pairs, rows, optimizer=self.d_optimizer)
        pairs = zip(g_gradients, self.generator.trainable_variables)
        self.g_optimizer.apply_gradients(pairs)
        # accum: self.accumulate(pairs, rows, optimizer=self.g_optimizer)
        return {"d_loss": d_loss, "g_loss": g_loss}


def main(batch_size, epochs):
    images, _ = program_data.digits()
    codes, _ = program_data.table(columns=CODE)
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, strides=2),
            keras.layers.LeakyReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    generator = keras.Sequential(
        [
            keras.Input((CODE,)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Reshape((8, 8, 1)),
        ]
    )
    model = WGAN(discriminator, generator)
    # accum: model = WGAN(discriminator, generator, **ways)
    model.compile(keras.optimizers.SGD(0.01), keras.optimizers.SGD(0.01))
    model.fit(
        images, codes, batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return model
