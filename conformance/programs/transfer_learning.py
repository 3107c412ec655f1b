"""A head on frozen features, and then all of it, by a lower rate.

After https://keras.io/guides/transfer_learning/
"""

import keras

# accum+: import keras_accum
from conformance import program_data


def batch():
    images, classes = program_data.digits(16)
    return images, classes


def main(batch_size, epochs):
    images, classes = program_data.digits()
    base = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(8, 3, activation="relu"),
        ]
    )
    base.trainable = False
    inputs = keras.Input((8, 8, 1))
    # Functional models of Keras hand their own `training` on all the same, so that
    # its statistics are those of the batch once it trains.
    x = base(inputs, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(10)(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    model.fit(images, classes, batch_size, epochs, shuffle=False, verbose=0)
    base.trainable = True
    model.compile(keras.optimizers.SGD(0.01), loss, metrics=["accuracy"])
    model.fit(images, classes, batch_size, epochs, shuffle=False, verbose=0)
    return model
