"""Contrastive learning: two views of each image, each other's only pair.

After https://keras.io/examples/vision/semisupervised_simclr/
"""

import keras
import numpy as np
from keras import ops

# accum+: import keras_accum
from conformance import program_data


def contrastive_loss(y_true, y_pred):
    first, second = ops.split(ops.normalize(y_pred, axis=-1), 2, axis=1)
    similarities = ops.matmul(first, ops.transpose(second)) / 0.1
    labels = ops.arange(ops.shape(first)[0])
    loss = keras.losses.sparse_categorical_crossentropy
    return loss(labels, similarities, from_logits=True) + loss(
        labels, ops.transpose(similarities), from_logits=True
    )


def main(batch_size, epochs):
    images, _ = program_data.digits()
    rng = np.random.default_rng(0)
    views = [
        images + rng.normal(0, 0.1, images.shape).astype("float32")
        for _ in range(2)
    ]
    encoder = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, 2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(8),
        ]
    )
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    outputs = keras.layers.Concatenate()([encoder(view) for view in inputs])
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(keras.optimizers.SGD(0.05), contrastive_loss)
    model.fit(
        views,
        np.zeros((len(images), 1)),
        batch_size,
        epochs,
        shuffle=False,
        verbose=0,
    )
    return model
