"""Letters in an image, by an LSTM and the CTC loss.

After https://keras.io/examples/vision/captcha_ocr/
"""

import keras
import numpy as np

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    images, classes = program_data.digits(64)
    labels = np.stack([1 + classes, 1 + np.roll(classes, 1)], axis=1)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.Reshape((8, 64))(x)
    x = keras.layers.Dense(16, activation="relu")(x)
    x = keras.layers.Bidirectional(keras.layers.LSTM(8, return_sequences=True))(
        x
    )
    outputs = keras.layers.Dense(12)(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(keras.optimizers.SGD(0.01), keras.losses.CTC())
    model.fit(
        images, labels, batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return model
