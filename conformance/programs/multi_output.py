"""Tickets: two inputs, two outputs, with losses, weights and rows of each.

After https://keras.io/guides/functional_api/
"""

import keras
import numpy as np

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    title = keras.Input((None,), dtype="int32", name="title")
    tags = keras.Input((6,), name="tags")
    words = keras.layers.Embedding(20, 8, mask_zero=True)(title)
    words = keras.layers.LSTM(8)(words)
    features = keras.layers.concatenate([words, tags])
    priority = keras.layers.Dense(1, name="priority")(features)
    department = keras.layers.Dense(4, name="department")(features)
    inputs = [title, tags]
    outputs = {"priority": priority, "department": department}
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        loss={
            "priority": keras.losses.BinaryCrossentropy(from_logits=True),
            "department": keras.losses.CategoricalCrossentropy(
                from_logits=True
            ),
        },
        loss_weights={"priority": 1.0, "department": 0.2},
        weighted_metrics={"department": ["accuracy"]},
    )
    table, _ = program_data.table()
    rng = np.random.default_rng(0)
    departments = keras.utils.to_categorical(rng.integers(0, 4, 64), 4)
    priorities = rng.integers(0, 2, (64, 1)).astype("float32")
    model.fit(
        {"title": program_data.sentences(), "tags": table},
        {"priority": priorities, "department": departments},
        sample_weight={
            "priority": rng.uniform(0.5, 2.0, 64),
            "department": (rng.uniform(size=64) < 0.7).astype("float32"),
        },
        epochs=epochs,
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
    )
    return model
