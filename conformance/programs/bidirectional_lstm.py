"""Two bidirectional LSTMs that say whether a review is good.

After https://keras.io/examples/nlp/bidirectional_lstm_imdb/
"""

import keras

# accum+: import keras_accum
from conformance import program_data

WORDS = 20


def main(batch_size, epochs):
    tokens = program_data.sentences(words=WORDS)
    good = tokens[:, :1] % 2
    inputs = keras.Input(shape=(None,), dtype="int32")
    x = keras.layers.Embedding(WORDS, 8, mask_zero=True)(inputs)
    x = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True))(
        x
    )
    x = keras.layers.Bidirectional(keras.layers.LSTM(4))(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        keras.optimizers.SGD(0.5), "binary_crossentropy", metrics=["accuracy"]
    )
    model.fit(
        tokens,
        good,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
