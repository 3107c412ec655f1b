"""A sequence-to-sequence transformer with masks, and a dict of inputs.

After https://keras.io/examples/nlp/neural_machine_translation_with_transformer/
"""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

# accum+: import keras_accum
from conformance import program_data

WORDS, LENGTH, WIDTH = 20, 12, 16


class PositionalEmbedding(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = keras.layers.Embedding(WORDS, WIDTH, mask_zero=True)
        self.positions = keras.layers.Embedding(LENGTH, WIDTH)

    def call(self, inputs):
        positions = ops.arange(ops.shape(inputs)[-1])
        return self.tokens(inputs) + self.positions(positions)

    def compute_mask(self, inputs, mask=None):
        return ops.not_equal(inputs, 0)


class Block(keras.layers.Layer):
    """Attends to itself, and to an encoder's outputs if there are any."""

    def __init__(self, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.causal = causal
        self.own, self.other = (
            keras.layers.MultiHeadAttention(2, WIDTH // 2) for _ in range(2)
        )
        self.norms = [keras.layers.LayerNormalization() for _ in range(3)]
        self.projection = keras.Sequential(
            [
                keras.layers.Dense(32, activation="relu"),
                keras.layers.Dense(WIDTH),
            ]
        )

    def call(self, x, encoded=None):
        attended = self.own(x, x, x, use_causal_mask=self.causal)
        x = self.norms[0](x + attended)
        if encoded is not None:
            x = self.norms[1](x + self.other(x, encoded, encoded))
        return self.norms[2](x + self.projection(x))

    def compute_mask(self, x, encoded=None, mask=None):
        return mask


def main(batch_size, epochs):
    encoder_inputs = keras.Input((None,), dtype="int32", name="encoder_inputs")
    decoder_inputs = keras.Input((None,), dtype="int32", name="decoder_inputs")
    encoded = Block()(PositionalEmbedding()(encoder_inputs))
    x = Block(causal=True)(PositionalEmbedding()(decoder_inputs), encoded)
    outputs = keras.layers.Dense(WORDS, activation="softmax")(x)
    inputs = {
        "encoder_inputs": encoder_inputs,
        "decoder_inputs": decoder_inputs,
    }
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
        metrics=["accuracy"],
    )
    source = program_data.sentences(words=WORDS)
    target = np.where(source > 0, WORDS - source, 0)
    target = np.pad(target, ((0, 0), (0, 1)))
    pairs = (
        {"encoder_inputs": source, "decoder_inputs": target[:, :-1]},
        target[:, 1:],
    )
    dataset = tf.data.Dataset.from_tensor_slices(pairs).batch(batch_size)
    model.fit(dataset, epochs=epochs, verbose=0)
    return model
