"""Two views of each image, of which one's gradient is stopped.

After https://keras.io/examples/vision/simsiam/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


def cosine_distance(predicted, projected):
    projected = tf.stop_gradient(projected)
    predicted = tf.math.l2_normalize(predicted, axis=1)
    projected = tf.math.l2_normalize(projected, axis=1)
    return -tf.reduce_mean(tf.reduce_sum(predicted * projected, axis=1))


class SimSiam(keras.Model):
    # accum: class SimSiam(keras_accum.GradientAccumulationModel):
    def __init__(self, encoder, predictor, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.predictor = encoder, predictor
        self.loss_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def train_step(self, data):
        one, two = data
        with tf.GradientTape() as tape:
            z1, z2 = self.encoder(one), self.encoder(two)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            loss = cosine_distance(p1, z2) / 2 + cosine_distance(p2, z1) / 2
        weights = self.encoder.trainable_variables
        weights = weights + self.predictor.trainable_variables
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights))
        # accum: self.accumulate(zip(gradients, weights), tf.shape(one)[0])
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def main(batch_size, epochs):
    images, _ = program_data.digits()
    rng = np.random.default_rng(0)
    one = images + rng.normal(0, 0.1, images.shape).astype("float32")
    two = np.roll(images, 1, axis=2) * 0.8
    encoder = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(8),
            keras.layers.LayerNormalization(),
        ]
    )
    predictor = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(4, activation="relu"),
            keras.layers.Dense(8),
        ]
    )
    model = SimSiam(encoder, predictor)
    # accum: model = SimSiam(encoder, predictor, **ways)
    # The decay counts updates, of which there are two in an epoch.
    schedule = keras.optimizers.schedules.CosineDecay(0.05, decay_steps=8)
    model.compile(optimizer=keras.optimizers.SGD(schedule, momentum=0.6))
    views = tf.data.Dataset.zip(
        tf.data.Dataset.from_tensor_slices(one).batch(batch_size),
        tf.data.Dataset.from_tensor_slices(two).batch(batch_size),
    )
    model.fit(
        views,
        epochs=epochs,
        callbacks=[keras.callbacks.EarlyStopping(monitor="loss", patience=5)],
        verbose=0,
    )
    return model
