"""Two networks with an optimizer each, in one step.

After https://keras.io/guides/custom_train_step_in_tensorflow/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

CODE = 4


class GAN(keras.Model):
    # accum: class GAN(keras_accum.GradientAccumulationModel):
    def __init__(self, discriminator, generator, **kwargs):
        super().__init__(**kwargs)
        self.discriminator, self.generator = discriminator, generator
        self.d_loss = keras.metrics.Mean(name="d_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn, **kwargs):
        super().compile(**kwargs)
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
        self.loss_fn = loss_fn

    def train_step(self, data):
        images, codes = data
        rows = tf.shape(images)[0]
        generated = self.generator(codes)
        both = tf.concat([generated, images], axis=0)
        labels = tf.concat([tf.ones((rows, 1)), tf.zeros((rows, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(both))
        weights = self.discriminator.trainable_weights
        d_gradients = tape.gradient(d_loss, weights)
        with tf.GradientTape() as tape:
            predictions = self.discriminator(self.generator(codes))
            g_loss = self.loss_fn(tf.zeros((rows, 1)), predictions)
        g_gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(d_gradients, weights))
        # accum: self.accumulate(zip(d_gradients, weights), rows, self.d_optimizer)
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(g_gradients, weights))
        # accum: self.accumulate(zip(g_gradients, weights), rows, self.g_optimizer)
        self.d_loss.update_state(d_loss)
        return {"d_loss": self.d_loss.result()}


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
            keras.layers.Dense(4 * 4 * 4),
            keras.layers.Reshape((4, 4, 4)),
            keras.layers.Conv2DTranspose(
                1, 4, 2, padding="same", activation="sigmoid"
            ),
        ]
    )
    model = GAN(discriminator, generator)
    # accum: model = GAN(discriminator, generator, **ways)
    model.compile(
        d_optimizer=keras.optimizers.SGD(0.1),
        g_optimizer=keras.optimizers.SGD(0.1),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    model.fit(
        images,
        codes,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
