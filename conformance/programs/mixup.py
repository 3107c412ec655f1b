"""Pairs of images mixed, with soft labels and weights, by tf.data.

After https://keras.io/examples/vision/mixup/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data


def mix_up(one, two, share):
    images_one, labels_one = one
    images_two, labels_two = two
    x, y = tf.reshape(share, (-1, 1, 1, 1)), tf.reshape(share, (-1, 1))
    images = images_one * x + images_two * (1 - x)
    labels = labels_one * y + labels_two * (1 - y)
    return images, labels, 1.0 - 0.5 * share  # Pure images count less.


def main(batch_size, epochs):
    images, classes = program_data.digits()
    labels = keras.utils.to_categorical(classes, 10).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    shares = tf.random.stateless_uniform((64,), (1, 2))
    mixed = tf.data.Dataset.zip(
        data.shuffle(64, seed=1, reshuffle_each_iteration=False),
        data.shuffle(64, seed=2, reshuffle_each_iteration=False),
        tf.data.Dataset.from_tensor_slices(shares),
    )
    mixed = mixed.batch(batch_size).map(mix_up).prefetch(tf.data.AUTOTUNE)
    x = inputs = keras.Input((8, 8, 1))
    for filters in 8, 16:
        x = keras.layers.Conv2D(filters, 3, padding="same")(x)
        x = keras.layers.MaxPooling2D(2)(keras.layers.ReLU()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(10, activation="softmax")(x)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        metrics=[keras.metrics.CategoricalAccuracy()],
        weighted_metrics=[keras.metrics.KLDivergence()],
    )
    model.fit(
        mixed,
        validation_data=data.batch(batch_size),
        epochs=epochs,
        verbose=0,
    )
    return model
