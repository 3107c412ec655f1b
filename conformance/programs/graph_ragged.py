"""A message-passing network that takes molecules as ragged tensors.

After https://keras.io/examples/graph/mpnn-molecular-graphs/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

UNITS = 8


class MessagePassing(keras.Model):
    # accum: class MessagePassing(keras_accum.GradientAccumulationModel):
    def __init__(self, units, steps=2, **kwargs):
        super().__init__(**kwargs)
        self.steps = steps
        self.embedding = keras.layers.Dense(units)
        self.message = keras.layers.Dense(units, activation="relu")
        self.cell = keras.layers.GRUCell(units)
        self.classifier = keras.layers.Dense(1, activation="sigmoid")

    def call(self, graphs):
        ragged_atoms, ragged_pairs = graphs["atoms"], graphs["pairs"]
        # All molecules of the batch as one graph.
        molecule = ragged_atoms.value_rowids()
        offsets = tf.gather(
            ragged_atoms.row_starts(), ragged_pairs.value_rowids()
        )
        pairs = ragged_pairs.values + offsets[:, None]
        atoms = self.embedding(ragged_atoms.values)
        for _ in range(self.steps):
            messages = self.message(tf.gather(atoms, pairs[:, 1]))
            gathered = tf.math.unsorted_segment_sum(
                messages, pairs[:, 0], tf.shape(atoms)[0]
            )
            atoms, _ = self.cell(gathered, atoms)
        means = tf.math.unsorted_segment_mean(
            atoms, molecule, ragged_atoms.nrows()
        )
        return self.classifier(means)


def main(batch_size, epochs):
    model = MessagePassing(UNITS)
    # accum: model = MessagePassing(UNITS, **ways)
    model.compile(
        keras.optimizers.SGD(0.1), "binary_crossentropy", metrics=["accuracy"]
    )
    atoms, pairs, labels = program_data.molecules()
    graphs = {"atoms": atoms, "pairs": pairs}
    dataset = tf.data.Dataset.from_tensor_slices((graphs, labels))
    model.fit(dataset.batch(batch_size), epochs=epochs, verbose=0)
    return model
