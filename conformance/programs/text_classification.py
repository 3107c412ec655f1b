"""Classes of texts, which a pipeline turns into words' numbers.

After https://keras.io/examples/nlp/text_classification_from_scratch/
"""

import re
import string

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

GOOD = ["great", "fine", "lovely", "fun"]
BAD = ["dull", "poor", "awful", "slow"]
OTHER = ["the", "film", "was", "and", "its", "end", "a", "cast"]


def texts(rows=64):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, rows)
    said = []
    for label in labels:
        words = OTHER + 3 * (GOOD if label else BAD)
        chosen = rng.choice(words, rng.integers(4, 20))
        said.append("<br />".join([" ".join(chosen).capitalize(), "Bye!"]))
    return said, labels.astype("float32")


def standardize(text):
    text = tf.strings.regex_replace(tf.strings.lower(text), "<br />", " ")
    return tf.strings.regex_replace(
        text, f"[{re.escape(string.punctuation)}]", ""
    )


def main(batch_size, epochs):
    dataset = tf.data.Dataset.from_tensor_slices(texts()).batch(batch_size)
    vectorize = keras.layers.TextVectorization(
        standardize=standardize,
        max_tokens=30,
        output_mode="int",
        output_sequence_length=24,
    )
    vectorize.adapt(dataset.map(lambda x, y: x))
    dataset = dataset.map(lambda x, y: (vectorize(x[:, None]), y))
    dataset = dataset.cache().prefetch(tf.data.AUTOTUNE)

    inputs = keras.Input((None,), dtype="int64")
    x = keras.layers.Embedding(30, 8)(inputs)
    x = keras.layers.Conv1D(8, 7, strides=3, activation="relu")(x)
    x = keras.layers.GlobalMaxPooling1D()(x)
    x = keras.layers.Dense(8, activation="relu")(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        loss="binary_crossentropy",
        optimizer=keras.optimizers.SGD(0.1),
        metrics=["accuracy"],
    )
    model.fit(dataset, validation_data=dataset, epochs=epochs, verbose=0)
    return model
