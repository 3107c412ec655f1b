"""A random search over sizes and learning rates; the best model trains on.

After https://keras.io/keras_tuner/guides/getting_started/
"""

import tempfile

import keras
import keras_tuner

# accum+: import keras_accum
from conformance import program_data


class Classifier(keras_tuner.HyperModel):
    def build(self, hp):
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(
                    hp.Int("units", 8, 32, step=8), activation="relu"
                ),
                keras.layers.Dense(10),
            ]
        )
        # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
        rate = hp.Float("learning_rate", 0.01, 0.3, sampling="log")
        model.compile(
            optimizer=keras.optimizers.SGD(rate, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(*args, shuffle=hp.Fixed("shuffle", False), **kwargs)


def main(batch_size, epochs):
    images, classes = program_data.digits(96)
    training = images[:64], classes[:64]
    with tempfile.TemporaryDirectory() as folder:
        tuner = keras_tuner.RandomSearch(
            Classifier(),
            objective="val_loss",
            max_trials=3,
            seed=1,
            directory=folder,
        )
        tuner.search(
            *training,
            batch_size=batch_size,
            epochs=epochs,
            validation_data=(images[64:], classes[64:]),
            verbose=0,
        )
        model = tuner.get_best_models()[0]
    model.fit(*training, batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model
