"""Masked words told from the others, with a loss and a tracker of its own.

After https://keras.io/examples/nlp/masked_language_modeling/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

WORDS, LENGTH, WIDTH = 20, 12, 8
MASK = WORDS

loss_fn = keras.losses.SparseCategoricalCrossentropy(reduction=None)
loss_tracker = keras.metrics.Mean(name="loss")


class MaskedLanguageModel(keras.Model):
    # accum: class MaskedLanguageModel(keras_accum.GradientAccumulationModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = loss_fn(y, y_pred, sample_weight)
        loss_tracker.update_state(loss, sample_weight=sample_weight)
        return keras.ops.sum(loss)

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return {"loss": loss_tracker.result()}

    @property
    def metrics(self):
        return [loss_tracker]


def masked():
    tokens = program_data.sentences(words=WORDS, length=LENGTH)
    rng = np.random.default_rng(0)
    chosen = (rng.random(tokens.shape) < 0.15) & (tokens > 0)
    hidden = chosen & (rng.random(tokens.shape) < 0.9)
    return np.where(hidden, MASK, tokens), tokens, chosen.astype("float32")


def main(batch_size, epochs):
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = keras.ops.arange(LENGTH)
    x = keras.layers.Embedding(WORDS + 1, WIDTH)(inputs)
    x = x + keras.layers.Embedding(LENGTH, WIDTH)(positions)
    attended = keras.layers.MultiHeadAttention(2, WIDTH // 2)(x, x, x)
    x = keras.layers.LayerNormalization(epsilon=1e-6)(x + attended)
    hidden = keras.layers.Dense(16, activation="relu")(x)
    hidden = keras.layers.Dense(WIDTH)(hidden)
    x = keras.layers.LayerNormalization(epsilon=1e-6)(x + hidden)
    outputs = keras.layers.Dense(WORDS, activation="softmax")(x)
    model = MaskedLanguageModel(inputs, outputs)
    # accum: model = MaskedLanguageModel(inputs, outputs, **ways)
    model.compile(optimizer=keras.optimizers.SGD(0.01))
    dataset = tf.data.Dataset.from_tensor_slices(masked()).batch(batch_size)
    model.fit(dataset, epochs=epochs, verbose=0)
    return model
