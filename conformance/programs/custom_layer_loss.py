"""Losses that layers add: of activations, a regularizer's, and of weights.

After https://keras.io/guides/making_new_layers_and_models_via_subclassing/
"""

import keras

# accum+: import keras_accum
from conformance import program_data


class Sparse(keras.layers.Layer):
    """Wants its input to be small."""

    def __init__(self, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs):
        self.add_loss(self.rate * keras.ops.mean(keras.ops.abs(inputs)))
        return inputs


class Network(keras.Model):
    # accum: class Network(keras_accum.GradientAccumulationModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(
            16,
            activation="relu",
            kernel_regularizer=keras.regularizers.L2(0.01),
        )
        self.sparse = Sparse()
        self.code = keras.layers.Dense(
            4,
            kernel_regularizer="l1",
            activity_regularizer=keras.regularizers.L2(0.01),
        )
        self.outputs_ = keras.layers.Dense(1)

    def call(self, inputs):
        return self.outputs_(self.code(self.sparse(self.hidden(inputs))))


def main(batch_size, epochs):
    x, y = program_data.table()
    model = Network()
    # accum: model = Network(**ways)
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    model.fit(x, y, batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model
