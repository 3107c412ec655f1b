"""Layers in half precision, and an optimizer that scales the loss.

After https://www.tensorflow.org/guide/mixed_precision
"""

import keras

# accum+: import keras_accum
from conformance import program_data


def batch():
    images, classes = program_data.digits(16)
    return images.reshape(-1, 64), classes


def main(batch_size, epochs):
    images, classes = program_data.digits()
    images = images.reshape(-1, 64)
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    inputs = keras.Input((64,))
    x = keras.layers.Dense(64, activation="relu", dtype=policy)(inputs)
    x = keras.layers.Dense(64, activation="relu", dtype=policy)(x)
    x = keras.layers.Dense(10, dtype=policy)(x)
    outputs = keras.layers.Activation("softmax", dtype="float32")(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        loss="sparse_categorical_crossentropy",
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1),
            initial_scale=2**8,
            dynamic_growth_steps=3,
        ),
        metrics=["accuracy"],
    )
    model.fit(
        images,
        classes,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
