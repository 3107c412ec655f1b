"""A stateful LSTM, whose batches follow each other in time.

After https://machinelearningmastery.com/understanding-stateful-lstm-recurrent-neural-networks-python-keras/
"""

import keras
import numpy as np

# accum+: import keras_accum

# `microbatch_size` is refused: rows of a batch do not follow each other.
REFUSED = ("microbatch_size",)
STEPS = 6


def waves(rows=64):
    rng = np.random.default_rng(0)
    phases = rng.uniform(0, 6, (rows, 1))
    values = np.sin(phases + 0.5 * np.arange(STEPS + 1)).astype("float32")
    return values[:, :-1, None], values[:, -1:]


def batch():
    return waves(16)


def main(batch_size, epochs):
    x, y = waves()
    inputs = keras.Input((STEPS, 1), batch_size=batch_size)
    hidden = keras.layers.LSTM(8, stateful=True)(inputs)
    outputs = keras.layers.Dense(1)(hidden)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        loss="mean_squared_error", optimizer=keras.optimizers.SGD(0.1)
    )
    for _ in range(epochs):
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        model.get_layer(index=1).reset_state()
    return model
