"""Columns of several kinds, preprocessed in tf.data, then within the model.

After https://keras.io/examples/structured_data/structured_data_classification_with_feature_space/
"""

import keras
import numpy as np
import tensorflow as tf

# accum+: import keras_accum
from keras.utils import FeatureSpace


def table(rows=64):
    rng = np.random.default_rng(0)
    columns = {
        "age": rng.integers(20, 80, rows).astype("float32"),
        "pressure": rng.normal(130, 15, rows).astype("float32"),
        "sex": rng.integers(0, 2, rows).astype("int32"),
        "blood": rng.choice(["a", "b", "ab", "zero"], rows),
    }
    risk = columns["age"] / 50 + (columns["blood"] == "ab")
    return columns, (risk > 1.2).astype("float32")


def model_of(inputs, outputs):
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main(batch_size, epochs):
    columns, labels = table()
    dataset = tf.data.Dataset.from_tensor_slices((columns, labels))
    feature_space = FeatureSpace(
        features={
            "age": FeatureSpace.float_discretized(num_bins=5),
            "pressure": FeatureSpace.float_normalized(),
            "sex": FeatureSpace.integer_categorical(num_oov_indices=0),
            "blood": FeatureSpace.string_categorical(num_oov_indices=0),
        },
        crosses=[FeatureSpace.cross(("sex", "blood"), crossing_dim=8)],
        output_mode="concat",
    )
    # Quantiles of a column depend on the batches that they are adapted to.
    feature_space.adapt(dataset.map(lambda x, _: x).batch(32))
    dataset = dataset.batch(batch_size)
    inputs = feature_space.get_inputs()
    encoded = feature_space.get_encoded_features()
    hidden = keras.layers.Dense(8, activation="relu")(encoded)
    outputs = keras.layers.Dense(1, activation="sigmoid")(hidden)

    training_model = model_of(encoded, outputs)
    training_model.fit(
        dataset.map(lambda x, y: (feature_space(x), y)),
        epochs=epochs,
        verbose=0,
    )
    # The same weights, of raw columns.
    end_to_end = model_of(inputs, outputs)
    end_to_end.fit(dataset, epochs=epochs, validation_data=dataset, verbose=0)
    patient = {
        name: tf.constant(column[:1]) for name, column in columns.items()
    }
    end_to_end.predict(patient, verbose=0)
    return end_to_end
