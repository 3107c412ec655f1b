"""Strokes of a pen to letters: an endpoint layer adds the CTC loss.

After https://keras.io/examples/vision/handwriting_recognition/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

CHARACTERS, FRAMES, FEATURES = 6, 12, 5


class CTCLayer(keras.layers.Layer):
    def call(self, labels, label_length, frames, logits):
        losses = tf.nn.ctc_loss(
            labels=tf.cast(labels, "int32"),
            logits=logits,
            label_length=label_length[:, 0],
            logit_length=frames[:, 0],
            logits_time_major=False,
            blank_index=-1,
        )
        self.add_loss(tf.reduce_mean(losses))
        return logits


def lines_of_text(rows=64):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, (rows, 1)).astype("int32")
    labels = rng.integers(1, CHARACTERS, (rows, 4)).astype("int32")
    labels *= np.arange(4) < lengths
    frames = rng.integers(9, FRAMES + 1, (rows, 1)).astype("int32")
    strokes = rng.normal(size=(rows, FRAMES, FEATURES)).astype("float32")
    strokes[:, :8] += np.repeat(labels, 2, axis=1)[:, :, None]
    return {
        "strokes": strokes,
        "frames": frames,
        "labels": labels,
        "label_length": lengths,
    }


def main(batch_size, epochs):
    strokes = keras.Input((None, FEATURES), name="strokes")
    frames = keras.Input((1,), name="frames", dtype="int32")
    labels = keras.Input((None,), name="labels", dtype="int32")
    label_length = keras.Input((1,), name="label_length", dtype="int32")
    x = keras.layers.Conv1D(8, 3, padding="same", activation="relu")(strokes)
    x = keras.layers.Bidirectional(keras.layers.GRU(8, return_sequences=True))(
        x
    )
    logits = keras.layers.Dense(CHARACTERS + 1)(x)
    outputs = CTCLayer()(labels, label_length, frames, logits)
    inputs = [strokes, frames, labels, label_length]
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(optimizer=keras.optimizers.SGD(0.01))
    dataset = tf.data.Dataset.from_tensor_slices(lines_of_text())
    model.fit(dataset.batch(batch_size), epochs=epochs, verbose=0)
    return model
