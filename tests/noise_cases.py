"""What is trained in windows that follow the noise scale, and their sizes."""

import keras
import numpy as np
import tensorflow as tf

import keras_accum


def model_of(noise, strategy=None, **kwargs):
    """Returns a model of one weight, and rows whose noise scale is `noise**2`.

    Its weight does not move.
    """
    with (strategy or tf.distribute.get_strategy()).scope():
        inputs = keras.Input((1,))
        outputs = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="zeros"
        )(inputs)
        model = keras_accum.GradientAccumulationModel(inputs, outputs, **kwargs)
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    # The gradient of a row is -2 y, with a mean of 2: the scale is noise^2.
    rng = np.random.default_rng(0)
    y = (1.0 + noise * rng.normal(size=(4096, 1))).astype("float32")
    return model, np.ones_like(y), y


class Sizes(keras.callbacks.Callback):
    """Notes how many batches each window has."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def on_train_batch_end(self, batch, logs=None):
        self.updates.append(int(self.model.optimizer.iterations.numpy()))

    @property
    def windows(self):
        _, counts = np.unique(self.updates, return_counts=True)
        return counts[1:-1].tolist()
