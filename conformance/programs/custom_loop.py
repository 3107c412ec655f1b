"""A training loop written by hand, with metrics and added losses.

After https://keras.io/guides/writing_a_custom_training_loop_in_tensorflow/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    images, classes = program_data.digits(80)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu", kernel_regularizer="l2"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metric = keras.metrics.SparseCategoricalAccuracy()
    # accum+: accumulator = keras_accum.GradientAccumulator(model.trainable_weights)
    # accum+: batch_size, window = 8, 4

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_fn(y, logits) + sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply(gradients, model.trainable_weights)
        # accum: accumulator.add(gradients, tf.shape(x)[0])
        metric.update_state(y, logits)
        return loss

    @tf.function
    def test_step(x, y):
        metric.update_state(y, model(x, training=False))

    training = tf.data.Dataset.from_tensor_slices((images[:64], classes[:64]))
    training = training.batch(batch_size)
    validation = tf.data.Dataset.from_tensor_slices((images[64:], classes[64:]))
    for _ in range(epochs):
        for x, y in training:
            train_step(x, y)
            # accum+: if accumulator.count == window:
            # accum+:     optimizer.apply(accumulator.mean(), model.trainable_weights)
            # accum+:     accumulator.reset()
        metric.reset_state()
        for x, y in validation.batch(batch_size):
            test_step(x, y)
        metric.reset_state()
    return model
