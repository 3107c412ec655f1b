"""Named entities by a transformer block, with a mean over the words that count.

After https://keras.io/examples/nlp/ner_transformers/
"""

import keras
import numpy as np

# accum+: import keras_accum
from conformance import program_data

WORDS, TAGS = 20, 4


class MaskedLoss(keras.losses.Loss):
    def __init__(self, name="masked"):
        super().__init__(name=name, reduction=None)
        self.loss_fn = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=None
        )

    def call(self, y_true, y_pred):
        loss = self.loss_fn(y_true, y_pred)
        mask = keras.ops.cast(y_true > 0, "float32")
        return keras.ops.sum(loss * mask) / keras.ops.sum(mask)


def main(batch_size, epochs):
    tokens = program_data.sentences(words=WORDS)
    tags = np.where(tokens > 0, 1 + tokens % (TAGS - 1), 0)
    inputs = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(WORDS, 8)(inputs)
    attention = keras.layers.MultiHeadAttention(2, 4)(hidden, hidden)
    hidden = keras.layers.LayerNormalization()(hidden + attention)
    hidden = keras.layers.Dense(16, activation="relu")(hidden)
    outputs = keras.layers.Dense(TAGS)(hidden)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(keras.optimizers.SGD(0.1), MaskedLoss())
    model.fit(
        tokens,
        tags,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
