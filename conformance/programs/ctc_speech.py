"""Words in a spectrogram, by a loss function that calls Keras's CTC.

After https://keras.io/examples/audio/ctc_asr/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

CHARACTERS, BANDS = 6, 5


def ctc_loss(y_true, y_pred):
    rows = tf.shape(y_true)[0]
    frames = tf.fill([rows], tf.shape(y_pred)[1])
    # Labels of a batch are padded with 0 to the length of the longest.
    lengths = tf.math.count_nonzero(y_true, axis=1, dtype="int32")
    return keras.ops.ctc_loss(y_true, y_pred, lengths, frames, mask_index=0)


def recordings(rows=64):
    rng = np.random.default_rng(0)
    for _ in range(rows):
        label = rng.integers(1, CHARACTERS, rng.integers(1, 6))
        spectrogram = rng.normal(size=(12, BANDS))
        spectrogram[: 2 * len(label)] += np.repeat(label, 2)[:, None]
        yield spectrogram, label


def main(batch_size, epochs):
    inputs = keras.Input((None, BANDS))
    x = keras.layers.Reshape((-1, BANDS, 1))(inputs)
    x = keras.layers.Conv2D(4, (3, 3), padding="same", activation="relu")(x)
    x = keras.layers.Reshape((-1, 4 * BANDS))(x)
    x = keras.layers.Bidirectional(keras.layers.GRU(8, return_sequences=True))(
        x
    )
    outputs = keras.layers.Dense(CHARACTERS + 1)(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(keras.optimizers.SGD(0.01), loss=ctc_loss)
    dataset = tf.data.Dataset.from_generator(
        recordings,
        output_signature=(
            tf.TensorSpec((None, BANDS), "float32"),
            tf.TensorSpec((None,), "int32"),
        ),
    )
    model.fit(dataset.padded_batch(batch_size), epochs=epochs, verbose=0)
    return model
