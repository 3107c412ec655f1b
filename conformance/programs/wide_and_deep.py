"""Numbers and categories, one branch wide and one deep.

After https://keras.io/examples/structured_data/wide_deep_cross_networks/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

TOWNS = ["north", "south", "east", "west"]


def main(batch_size, epochs):
    numbers, target = program_data.table()
    towns = np.array(TOWNS)[np.arange(len(numbers)) % 4]
    features = {"numbers": numbers, "town": towns[:, None]}
    lookup = keras.layers.StringLookup(vocabulary=TOWNS)
    dataset = tf.data.Dataset.from_tensor_slices((features, target))
    dataset = dataset.batch(batch_size).map(
        lambda x, y: ({**x, "town": lookup(x["town"])}, y)
    )
    inputs = {
        "numbers": keras.Input((6,), name="numbers"),
        "town": keras.Input((1,), dtype="int64", name="town"),
    }
    wide = keras.layers.CategoryEncoding(5, "one_hot")(inputs["town"])
    deep = keras.layers.Flatten()(keras.layers.Embedding(5, 3)(inputs["town"]))
    deep = keras.layers.Concatenate()([deep, inputs["numbers"]])
    for _ in range(2):
        deep = keras.layers.Dense(16, activation="relu")(deep)
        deep = keras.layers.LayerNormalization()(deep)
    outputs = keras.layers.Dense(1)(keras.layers.Concatenate()([wide, deep]))
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    model.fit(dataset, epochs=epochs, verbose=0)
    return model
