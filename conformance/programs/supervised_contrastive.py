"""Rows of one class are drawn together, all others apart.

After https://keras.io/examples/vision/supervised-contrastive-learning/
"""

import keras
from keras import ops

# accum+: import keras_accum
from conformance import program_data


class SupervisedContrastiveLoss(keras.losses.Loss):
    def __init__(self, temperature=0.5, name=None):
        super().__init__(name=name)
        self.temperature = temperature

    def call(self, labels, feature_vectors):
        normalized = ops.normalize(feature_vectors, axis=1)
        logits = ops.matmul(normalized, ops.transpose(normalized))
        logits = logits / self.temperature
        same = ops.equal(labels, ops.transpose(labels))
        targets = ops.cast(same, logits.dtype)
        targets = targets / ops.sum(targets, axis=1, keepdims=True)
        return -ops.sum(targets * ops.log_softmax(logits, axis=1), axis=1)


def main(batch_size, epochs):
    images, classes = program_data.digits()
    inputs = keras.Input((8, 8, 1))
    features = keras.layers.Flatten()(inputs)
    features = keras.layers.Dense(32, activation="relu")(features)
    outputs = keras.layers.Dense(16, activation="relu")(features)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=SupervisedContrastiveLoss(0.5),
    )
    model.fit(
        images, classes[:, None], batch_size, epochs, shuffle=False, verbose=0
    )
    return model
