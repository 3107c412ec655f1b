"""A small vision transformer, watched by eight callbacks.

After https://keras.io/examples/vision/image_classification_with_vision_transformer/
"""

import pathlib
import tempfile

import keras

# accum+: import keras_accum
from conformance import program_data

PATCHES, WIDTH = 16, 16


class PatchEncoder(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.projection = keras.layers.Dense(WIDTH)
        self.position = keras.layers.Embedding(PATCHES, WIDTH)

    def build(self, input_shape):
        self.projection.build((None, PATCHES, 4))
        self.position.build((None,))

    def call(self, images):
        patches = keras.ops.image.extract_patches(images, 2)
        patches = keras.ops.reshape(patches, (-1, PATCHES, 4))
        positions = self.position(keras.ops.arange(PATCHES))
        return self.projection(patches) + positions


def vit():
    images = keras.Input((8, 8, 1))
    x = PatchEncoder()(images)
    for _ in range(2):
        normal = keras.layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + keras.layers.MultiHeadAttention(2, 8)(normal, normal)
        normal = keras.layers.LayerNormalization(epsilon=1e-6)(x)
        hidden = keras.layers.Dense(2 * WIDTH, activation="gelu")(normal)
        x = x + keras.layers.Dense(WIDTH)(hidden)
    x = keras.layers.Flatten()(keras.layers.LayerNormalization()(x))
    logits = keras.layers.Dense(10)(x)
    return keras.Model(images, logits)
    # accum: return keras_accum.GradientAccumulationModel(images, logits, **ways)


def callbacks(folder):
    return [
        keras.callbacks.ModelCheckpoint(
            str(folder / "best.weights.h5"),
            monitor="val_loss",
            save_best_only=True,
            save_weights_only=True,
        ),
        keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: 0.05 if epoch == 0 else rate
        ),
        # Nothing gets better by so much: acts after each epoch but the first.
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=9),
        keras.callbacks.EarlyStopping(
            "val_loss", patience=3, restore_best_weights=True
        ),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.CSVLogger(str(folder / "log.csv")),
        keras.callbacks.TensorBoard(str(folder / "board"), histogram_freq=1),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: print(epoch, logs["val_loss"])
        ),
    ]


def main(batch_size, epochs):
    images, classes = program_data.digits()
    model = vit()
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(5, name="top_5"),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model.fit(
            images,
            classes,
            batch_size=batch_size,
            epochs=epochs,
            validation_data=(images, classes),
            shuffle=False,
            callbacks=callbacks(folder),
            verbose=0,
        )
        model.load_weights(folder / "best.weights.h5")
    return model
