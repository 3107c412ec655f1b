"""A convolutional network for digits, with a split for validation.

After https://keras.io/examples/vision/mnist_convnet/
"""

import keras

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    images, classes = program_data.digits(80)
    labels = keras.utils.to_categorical(classes, 10)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.0),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(
        images,
        labels,
        batch_size=batch_size,
        epochs=epochs,
        validation_split=0.2,
        shuffle=False,
        verbose=0,
    )
    return model
