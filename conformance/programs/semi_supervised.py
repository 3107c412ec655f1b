"""Contrastive learning of unlabeled images, and a probe on labeled ones.

After https://keras.io/examples/vision/semisupervised_simclr/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

WIDTH = 16
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class ContrastiveModel(keras.Model):
    # accum: class ContrastiveModel(keras_accum.GradientAccumulationModel):
    def __init__(self, encoder, projection_head, linear_probe, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.projection_head = encoder, projection_head
        self.linear_probe = linear_probe
        self.contrastive_tracker = keras.metrics.Mean(name="c_loss")
        self.probe_tracker = keras.metrics.Mean(name="p_loss")

    def compile(self, contrastive_optimizer, probe_optimizer, **kwargs):
        super().compile(**kwargs)
        self.contrastive_optimizer = contrastive_optimizer
        self.probe_optimizer = probe_optimizer

    @property
    def metrics(self):
        return [self.contrastive_tracker, self.probe_tracker]

    def contrastive_loss(self, views):
        first, second = (
            tf.math.l2_normalize(self.projection_head(self.encoder(view)), 1)
            for view in views
        )
        similarities = tf.matmul(first, second, transpose_b=True) / 0.1
        labels = tf.range(tf.shape(first)[0])
        return (
            cross_entropy(labels, similarities)
            + cross_entropy(labels, tf.transpose(similarities))
        ) / 2

    def train_step(self, data):
        views, (labeled, labels) = data
        # accum+: rows = tf.shape(labels)[0]
        with tf.GradientTape() as tape:
            loss = self.contrastive_loss(views)
        weights = self.encoder.trainable_weights
        weights = weights + self.projection_head.trainable_weights
        pairs = zip(tape.gradient(loss, weights), weights)
        self.contrastive_optimizer.apply_gradients(pairs)
        # accum: self.accumulate(pairs, rows, self.contrastive_optimizer)
        self.contrastive_tracker.update_state(loss)
        features = self.encoder(labeled)
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, self.linear_probe(features))
        weights = self.linear_probe.trainable_weights
        pairs = zip(tape.gradient(loss, weights), weights)
        self.probe_optimizer.apply_gradients(pairs)
        # accum: self.accumulate(pairs, rows, self.probe_optimizer)
        self.probe_tracker.update_state(loss)
        return {metric.name: metric.result() for metric in self.metrics}


def data(rows, batch_size):
    images, classes = program_data.digits(rows)
    noise = np.random.default_rng(0).normal(0, 0.1, images.shape)
    views = images, images + noise.astype("float32")
    unlabeled = tf.data.Dataset.from_tensor_slices(views).batch(batch_size)
    # One image of four has a label.
    labeled = images[: rows // 4], classes[: rows // 4]
    labeled = tf.data.Dataset.from_tensor_slices(labeled).repeat(4)
    return tf.data.Dataset.zip((unlabeled, labeled.batch(batch_size)))


def batch():
    return next(iter(data(16, 16)))


def main(batch_size, epochs):
    encoder = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(WIDTH, activation="relu"),
        ]
    )
    projection_head, linear_probe = (
        keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(units)])
        for units in (8, 10)
    )
    networks = encoder, projection_head, linear_probe
    model = ContrastiveModel(*networks)
    # accum: model = ContrastiveModel(*networks, **ways)
    model.compile(
        contrastive_optimizer=keras.optimizers.SGD(0.05),
        probe_optimizer=keras.optimizers.SGD(0.1),
    )
    model.fit(data(64, batch_size), epochs=epochs, verbose=0)
    return model
