"""Several captions of an image, each with a tape of its own, in a step.

After https://keras.io/examples/vision/image_captioning/
"""

import keras
import tensorflow as tf

# accum+: import keras_accum
from conformance import program_data

CAPTIONS, LENGTH, WORDS, UNITS = 3, 8, 20, 8


def plus(sums, gradients, factor=1.0):
    # accum:
    pairs = zip(sums, gradients)
    # accum:
    return [a if b is None else a + factor * b for a, b in pairs]
    # accum:


class ImageCaptioningModel(keras.Model):
    # accum: class ImageCaptioningModel(keras_accum.GradientAccumulationModel):
    def __init__(self, cnn_model, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.cnn_model = cnn_model
        self.cnn_model.trainable = False
        self.encoder, self.decoder = encoder, decoder
        self.topics = keras.layers.Dense(WORDS)
        self.topics.build((None, UNITS))
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.accuracy = keras.metrics.Mean(name="accuracy")

    @property
    def metrics(self):
        return [self.loss_tracker, self.accuracy]

    def caption_loss(self, features, caption, training):
        inputs, truth = caption[:, :-1], caption[:, 1:]
        mask = tf.cast(truth != 0, "float32")
        encoded = self.encoder(features, training=training)
        logits = self.decoder([inputs, encoded], training=training)
        losses = self.loss(truth, logits)
        loss = tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)
        right = tf.argmax(logits, axis=-1, output_type="int32") == truth
        self.loss_tracker.update_state(losses, mask)
        self.accuracy.update_state(right, mask)
        return loss, tf.reduce_sum(mask)

    def topic_loss(self, features, captions):
        encoded = tf.reduce_mean(self.encoder(features), axis=1)
        words = tf.reduce_max(tf.one_hot(captions, WORDS), axis=(1, 2))
        return tf.reduce_mean(
            keras.losses.binary_crossentropy(
                words, self.topics(encoded), from_logits=True
            )
        )

    def train_step(self, data):
        images, captions = data
        features = self.cnn_model(images)
        weights = self.trainable_weights
        total, tokens = [0.0] * len(weights), 0.0
        # accum:
        for i in range(CAPTIONS):
            with tf.GradientTape() as tape:
                loss, count = self.caption_loss(features, captions[:, i], True)
            gradients = tape.gradient(loss, weights)
            total = plus(total, gradients, count)
            # accum: self.accumulate(zip(gradients, weights), count)
            tokens += count
            # accum:
        with tf.GradientTape() as tape:
            loss = 0.5 * self.topic_loss(features, captions)
        gradients = tape.gradient(loss, weights)
        gradients = plus([a / tokens for a in total], gradients)
        # accum:
        self.optimizer.apply_gradients(zip(gradients, weights))
        # accum: self.accumulate(zip(gradients, weights), tf.shape(images)[0])
        return {m.name: m.result() for m in self.metrics}

    def test_step(self, data):
        images, captions = data
        features = self.cnn_model(images)
        for i in range(CAPTIONS):
            self.caption_loss(features, captions[:, i], False)
        return {m.name: m.result() for m in self.metrics}


def networks():
    images = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(UNITS, 3, 2, "same", activation="relu")(images)
    cnn = keras.Model(images, keras.layers.Reshape((-1, UNITS))(x))
    features = keras.Input((16, UNITS))
    x = keras.layers.Dense(UNITS, activation="relu")(features)
    x = x + keras.layers.MultiHeadAttention(2, 4)(x, x)
    encoder = keras.Model(features, keras.layers.LayerNormalization()(x))
    tokens = keras.Input((LENGTH - 1,), dtype="int32")
    encoded = keras.Input((16, UNITS))
    x = keras.layers.Embedding(WORDS, UNITS, mask_zero=True)(tokens)
    attention = keras.layers.MultiHeadAttention(2, 4)
    x = x + attention(x, x, use_causal_mask=True)
    x = x + keras.layers.MultiHeadAttention(2, 4)(x, encoded)
    logits = keras.layers.Dense(WORDS)(keras.layers.LayerNormalization()(x))
    return cnn, encoder, keras.Model([tokens, encoded], logits)


def main(batch_size, epochs):
    images, _ = program_data.digits()
    captions = program_data.sentences(64 * CAPTIONS, LENGTH, WORDS)
    captions = captions.reshape(64, CAPTIONS, LENGTH)
    model = ImageCaptioningModel(*networks())
    # accum: model = ImageCaptioningModel(*networks(), **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=None
        ),
    )
    model.fit(
        images,
        captions,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(images, captions),
        shuffle=False,
        verbose=0,
    )
    return model
