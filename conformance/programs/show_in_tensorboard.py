"""A classifier whose graph, weights and metrics TensorBoard shows.

After https://www.tensorflow.org/tensorboard/get_started
"""

import tempfile

import keras

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    images, classes = program_data.digits(80)
    inputs = keras.Input((8, 8, 1), name="images")
    hidden = keras.layers.Flatten()(inputs)
    hidden = keras.layers.Dense(32, activation="relu")(hidden)
    outputs = keras.layers.Dense(10, activation="softmax")(hidden)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    with tempfile.TemporaryDirectory() as folder:
        tensorboard = keras.callbacks.TensorBoard(
            folder, histogram_freq=1, write_graph=True, update_freq=1
        )
        model.fit(
            images[:64],
            classes[:64],
            batch_size,
            epochs=epochs,
            validation_data=(images[64:], classes[64:]),
            callbacks=[tensorboard],
            shuffle=False,
            verbose=0,
        )
    return model
