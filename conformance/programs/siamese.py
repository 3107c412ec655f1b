"""Triplets of images and their distances, by a network of three branches.

After https://keras.io/examples/vision/siamese_network/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


class DistanceLayer(keras.layers.Layer):
    def call(self, anchor, positive, negative):
        near = keras.ops.sum(tf.square(anchor - positive), -1)
        far = keras.ops.sum(tf.square(anchor - negative), -1)
        return near, far


class SiameseModel(keras.Model):
    # accum: class SiameseModel(keras_accum.GradientAccumulationModel):
    def __init__(self, siamese_network, margin=0.5, **kwargs):
        super().__init__(**kwargs)
        self.siamese_network, self.margin = siamese_network, margin
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.siamese_network(inputs)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self._compute_loss(data)
        gradients = tape.gradient(loss, self.siamese_network.trainable_weights)
        self.optimizer.apply_gradients(
            # accum: self.accumulate(
            zip(gradients, self.siamese_network.trainable_weights)
            # accum+: , tf.shape(data[0])[0]
        )
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def _compute_loss(self, data):
        near, far = self.siamese_network(data)
        return tf.reduce_mean(tf.maximum(near - far + self.margin, 0.0))

    @property
    def metrics(self):
        return [self.loss_tracker]


def main(batch_size, epochs):
    images, _ = program_data.digits(64)
    triplets = images, np.roll(images, 1, 0), np.roll(images, 7, 0)
    embedding = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(8),
        ]
    )
    inputs = [keras.Input((8, 8, 1)) for _ in range(3)]
    distances = DistanceLayer()(*map(embedding, inputs))
    model = SiameseModel(keras.Model(inputs, distances))
    # accum: model = SiameseModel(keras.Model(inputs, distances), **ways)
    model.compile(optimizer=keras.optimizers.SGD(0.01))
    dataset = tf.data.Dataset.from_tensor_slices(triplets).batch(batch_size)
    model.fit(dataset, epochs=epochs, verbose=0)
    return model
