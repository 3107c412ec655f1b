"""Pairs of images of a class, told from the other pairs of the batch.

After https://keras.io/examples/vision/metric_learning/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


class Pairs(keras.utils.PyDataset):
    """Batches of anchors, and of another image of the same class."""

    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        images, classes = program_data.digits(64)
        self.anchors, self.rows = images, rows
        self.positives = np.stack(
            [
                images[np.flatnonzero(classes == each)[i % 4]]
                for i, each in enumerate(classes)
            ]
        )

    def __len__(self):
        return len(self.anchors) // self.rows

    def __getitem__(self, i):
        rows = slice(i * self.rows, (i + 1) * self.rows)
        return self.anchors[rows], self.positives[rows]


class EmbeddingModel(keras.Model):
    # accum: class EmbeddingModel(keras_accum.GradientAccumulationModel):
    def train_step(self, data):
        anchors, positives = data
        with tf.GradientTape() as tape:
            similarities = tf.einsum(
                "ae,pe->ap",
                self(anchors, training=True),
                self(positives, training=True),
            )
            labels = tf.range(tf.shape(anchors)[0])
            loss = self.compute_loss(y=labels, y_pred=similarities / 0.2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        # accum: self.accumulate(gradients, tf.shape(anchors)[0])
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(labels, similarities)
        return {metric.name: metric.result() for metric in self.metrics}


def make():
    inputs = keras.Input((8, 8, 1))
    hidden = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(inputs)
    hidden = keras.layers.Flatten()(hidden)
    hidden = keras.layers.Dense(8)(hidden)
    embeddings = keras.layers.UnitNormalization()(hidden)
    model = EmbeddingModel(inputs, embeddings)
    # accum: model = EmbeddingModel(inputs, embeddings, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def batch():
    return Pairs(16)[0]


def main(batch_size, epochs):
    model = make()
    model.fit(Pairs(batch_size), epochs=epochs, shuffle=False, verbose=0)
    return model
