"""A message-passing network on molecules, merged to one graph per batch.

After https://keras.io/examples/graph/mpnn-molecular-graphs/
"""

import keras
import tensorflow as tf
from keras import ops

# accum+: import keras_accum
from conformance import program_data

# What a row is of differs: atoms, pairs and molecules cannot be cut alike.
REFUSED = ("microbatch_size",)
FEATURES, UNITS = 4, 8


def merge(atoms, pairs, labels):
    offsets = atoms.row_starts()
    pairs = pairs.values + tf.gather(offsets, pairs.value_rowids())[:, None]
    return (atoms.values, pairs, atoms.value_rowids()), labels


class MessagePassing(keras.layers.Layer):
    def __init__(self, units, steps=2, **kwargs):
        super().__init__(**kwargs)
        self.steps = steps
        self.message = keras.layers.Dense(units, activation="relu")
        self.update = keras.layers.GRUCell(units)

    def call(self, atoms, pairs):
        for _ in range(self.steps):
            messages = self.message(ops.take(atoms, pairs[:, 1], axis=0))
            gathered = ops.segment_sum(
                messages, pairs[:, 0], num_segments=ops.shape(atoms)[0]
            )
            atoms, _ = self.update(gathered, atoms)
        return atoms


class Readout(keras.layers.Layer):
    def call(self, atoms, molecule):
        return tf.math.segment_mean(atoms, molecule)


def main(batch_size, epochs):
    atoms = keras.Input((FEATURES,))
    pairs = keras.Input((2,), dtype="int64")
    molecule = keras.Input((), dtype="int64")
    x = keras.layers.Dense(UNITS)(atoms)
    x = MessagePassing(UNITS)(x, pairs)
    x = Readout()(x, molecule)
    x = keras.layers.Dense(8, activation="relu")(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    inputs = [atoms, pairs, molecule]
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.BinaryCrossentropy(),
        metrics=[keras.metrics.AUC(name="AUC")],
    )
    dataset = tf.data.Dataset.from_tensor_slices(program_data.molecules())
    dataset = dataset.batch(batch_size).map(merge)
    model.fit(dataset, epochs=epochs, verbose=0, class_weight={0: 2.0, 1: 0.5})
    return model
