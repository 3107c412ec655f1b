"""Rare positives: a weight for each class, and metrics that show them.

After https://keras.io/examples/structured_data/imbalanced_classification/
"""

import keras
import numpy as np

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    x, targets = program_data.table(96)
    y = (targets[:, 0] > 0.9).astype("uint8")
    counts = np.bincount(y[:64])
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss="binary_crossentropy",
        metrics=[
            keras.metrics.FalseNegatives(name="fn"),
            keras.metrics.TruePositives(name="tp"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
            keras.metrics.AUC(name="auc"),
        ],
        weighted_metrics=["accuracy", keras.metrics.AUC(name="weighted_auc")],
    )
    model.fit(
        x[:64],
        y[:64],
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x[64:], y[64:]),
        class_weight={0: 1.0 / counts[0], 1: 1.0 / counts[1]},
        shuffle=False,
        verbose=0,
    )
    return model
