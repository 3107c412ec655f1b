"""Few labeled images and more unlabeled ones, whose classes shall be certain.

After https://keras.io/examples/vision/adamatch/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

# A batch has other rows of the one than of the other, and cannot be cut.
REFUSED = ("microbatch_size",)


def cross_entropy(classes, logits, counts=True):
    losses = keras.losses.sparse_categorical_crossentropy(
        classes, logits, from_logits=True
    )
    return tf.reduce_mean(losses * tf.cast(counts, "float32"))


class SemiSupervised(keras.Model):
    # accum: class SemiSupervised(keras_accum.GradientAccumulationModel):
    def __init__(self, network, target_weight=0.5, **kwargs):
        super().__init__(**kwargs)
        self.network, self.target_weight = network, target_weight
        self.source_tracker = keras.metrics.Mean(name="source_loss")
        self.target_tracker = keras.metrics.Mean(name="target_loss")

    @property
    def metrics(self):
        return [self.source_tracker, self.target_tracker]

    def train_step(self, data):
        (images, classes), unlabeled = data
        rows = tf.shape(images)[0], tf.shape(unlabeled)[0]
        weights = self.network.trainable_weights
        with tf.GradientTape() as tape:
            # accum: with tf.GradientTape(persistent=True) as tape:
            both = tf.concat([images, unlabeled], axis=0)
            logits = self.network(both, training=True)
            source, target = tf.split(logits, rows)
            source_loss = cross_entropy(classes, source)
            is_sure = tf.reduce_max(tf.nn.softmax(target), axis=1) > 0.12
            chosen = tf.argmax(target, axis=1)
            target_loss = cross_entropy(chosen, target, is_sure)
            target_loss *= self.target_weight
            loss = source_loss + target_loss
            # accum:
        gradients = tape.gradient(loss, weights)
        # accum: gradients = tape.gradient(source_loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights))
        # accum: self.accumulate(zip(gradients, weights), rows[0])
        # accum+: gradients = tape.gradient(target_loss, weights)
        # accum+: self.accumulate(zip(gradients, weights), rows[1])
        self.source_tracker.update_state(source_loss)
        self.target_tracker.update_state(target_loss)
        return {metric.name: metric.result() for metric in self.metrics}


def main(batch_size, epochs):
    images, classes = program_data.digits(16)
    unlabeled, _ = program_data.digits(64)
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    model = SemiSupervised(network)
    # accum: model = SemiSupervised(network, **ways)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    labeled = tf.data.Dataset.from_tensor_slices((images, classes))
    labeled = labeled.batch(batch_size // 4)
    unlabeled = tf.data.Dataset.from_tensor_slices(unlabeled)
    unlabeled = unlabeled.batch(batch_size)
    dataset = tf.data.Dataset.zip((labeled, unlabeled))
    model.fit(dataset, epochs=epochs, verbose=0)
    return model
