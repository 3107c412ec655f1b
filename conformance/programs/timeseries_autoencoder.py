"""Windows of a time series, reconstructed, until validation gets worse.

After https://keras.io/examples/timeseries/timeseries_anomaly_detection/
"""

import keras
import numpy as np

# accum+: import keras_accum

LENGTH = 16


def windows(rows=80):
    times = np.arange(rows + LENGTH - 1)
    noise = np.random.default_rng(0).normal(0, 0.1, len(times))
    series = np.sin(times / 3) + noise
    series = (series - series.mean()) / series.std()
    rows = np.lib.stride_tricks.sliding_window_view(series, LENGTH)
    return rows[..., None].astype("float32")


def main(batch_size, epochs):
    model = keras.Sequential(
        [
            keras.Input((LENGTH, 1)),
            keras.layers.Conv1D(8, 5, 2, padding="same", activation="relu"),
            keras.layers.Conv1D(4, 5, 2, padding="same", activation="relu"),
            keras.layers.Conv1DTranspose(
                4, 5, 2, padding="same", activation="relu"
            ),
            keras.layers.Conv1DTranspose(
                8, 5, 2, padding="same", activation="relu"
            ),
            keras.layers.Conv1DTranspose(1, 5, padding="same"),
        ]
    )
    # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    x = windows()
    model.fit(
        x,
        x,
        epochs=epochs,
        batch_size=batch_size,
        validation_split=0.2,
        callbacks=[
            keras.callbacks.EarlyStopping(
                monitor="val_loss",
                patience=5,
                mode="min",
                restore_best_weights=True,
            )
        ],
        shuffle=False,
        verbose=0,
    )
    return model
