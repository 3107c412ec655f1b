"""A message-passing network that takes molecules as ragged tensors.

After https://keras.io/examples/graph/mpnn-molecular-graphs/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum

FEATURES, UNITS = 4, 8


def molecules(rows=64):
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 8, rows)
    atoms = rng.normal(size=(sizes.sum(), FEATURES)).astype("float32")
    # Rings: each atom has two neighbors.
    pairs = np.concatenate(
        [
            np.stack([np.arange(n), np.roll(np.arange(n), shift)], axis=1)
            for n in sizes
            for shift in (-1, 1)
        ]
    )
    labels = rng.integers(0, 2, (rows, 1)).astype("float32")
    graphs = {
        "atoms": tf.RaggedTensor.from_row_lengths(atoms, sizes),
        "pairs": tf.RaggedTensor.from_row_lengths(pairs, 2 * sizes),
    }
    return graphs, labels


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
    dataset = tf.data.Dataset.from_tensor_slices(molecules())
    model.fit(dataset.batch(batch_size), epochs=epochs, verbose=0)
    return model
