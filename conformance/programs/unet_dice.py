"""Segmentation by a small U-Net, with Dice over the batch.

After https://keras.io/examples/vision/oxford_pets_image_segmentation/
"""

import keras

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    images, masks = program_data.shapes()
    inputs = keras.Input((16, 16, 1))
    first = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    down = keras.layers.MaxPooling2D()(first)
    down = keras.layers.SeparableConv2D(16, 3, padding="same")(down)
    down = keras.layers.LayerNormalization()(down)
    down = keras.layers.Activation("relu")(down)
    up = keras.layers.Conv2DTranspose(8, 3, 2, padding="same")(down)
    up = keras.layers.Concatenate()([first, up])
    outputs = keras.layers.Conv2D(1, 1, activation="sigmoid")(up)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.Dice())
    model.fit(
        images,
        masks,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
