"""A decoder of two blocks that predicts the next word.

After https://keras.io/examples/generative/text_generation_with_miniature_gpt/
"""

import keras
import numpy as np
from keras import ops

# accum+: import keras_accum
from conformance import program_data

WORDS, LENGTH, UNITS = 20, 12, 16


class TransformerBlock(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, UNITS // 2)
        self.feed_forward = keras.Sequential(
            [
                keras.layers.Dense(2 * UNITS, activation="relu"),
                keras.layers.Dense(UNITS),
            ]
        )
        self.first = keras.layers.LayerNormalization(epsilon=1e-6)
        self.second = keras.layers.LayerNormalization(epsilon=1e-6)

    def call(self, inputs):
        attention = self.attention(inputs, inputs, use_causal_mask=True)
        hidden = self.first(inputs + attention)
        return self.second(hidden + self.feed_forward(hidden))


class TokenAndPosition(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = keras.layers.Embedding(WORDS, UNITS)
        self.positions = keras.layers.Embedding(LENGTH, UNITS)

    def call(self, x):
        positions = ops.arange(0, ops.shape(x)[-1], 1)
        return self.tokens(x) + self.positions(positions)


def main(batch_size, epochs):
    tokens = program_data.sentences(words=WORDS, length=LENGTH)
    inputs = keras.Input((LENGTH,), dtype="int32")
    hidden = TokenAndPosition()(inputs)
    for _ in range(2):
        hidden = TransformerBlock()(hidden)
    outputs = keras.layers.Dense(WORDS)(hidden)
    model = keras.Model(inputs, [outputs, hidden])
    # accum: model = keras_accum.GradientAccumulationModel(inputs, [outputs, hidden], **ways)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # No loss of the second output.
    model.compile(keras.optimizers.SGD(0.1), loss=[loss_fn, None])
    targets = np.roll(tokens, -1, axis=1)
    model.fit(
        tokens,
        targets,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
