"""Code of a user's own in Keras: layers, losses, train steps, averages.

Of what belongs to accumulation there are two versions: how a model of
keras_accum is given gradients and code that runs once per update, and how an
optimizer of Keras is. All else is shared.
"""

import keras
import tensorflow as tf

from conformance import problems

IS_KERAS_3 = hasattr(keras, "ops")


class OneHotEmbedding(keras.layers.Embedding):
    """An embedding that looks nothing up, and has a dense gradient."""

    def call(self, inputs):
        """Returns the rows of the tokens."""
        one_hot = tf.one_hot(inputs, problems.TOKENS)
        return tf.tensordot(one_hot, tf.convert_to_tensor(self.embeddings), 1)


class AddsLoss(keras.layers.Layer):
    """Adds the loss `Problem.added` of what goes through it.

    Args:
        kind: Which of them.
        scale: Times the loss.
    """

    def __init__(self, kind: str, scale: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.kind, self.scale = kind, scale

    def call(self, inputs):
        """Returns the inputs."""
        if self.kind == "balance":
            shares = tf.reduce_mean(tf.nn.softmax(inputs), axis=0)
            loss = problems.UNITS * tf.reduce_sum(tf.square(shares))
        else:
            loss = tf.reduce_mean(tf.square(inputs), axis=-1)
        if self.kind == "row_mean":
            loss = tf.reduce_mean(loss)
        if not IS_KERAS_3:
            # It adds up no values by itself.
            loss = tf.reduce_sum(loss)
        self.add_loss(self.scale * loss)
        return inputs


def contrastive(y_true, y_pred):
    """Returns the contrastive loss of each row of "towers"."""
    del y_true
    query, key = tf.split(y_pred, 2, axis=-1)
    logits = tf.matmul(query, key, transpose_b=True)
    labels = tf.range(tf.shape(logits)[0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def counted(labels):
    """Returns which tokens count: 1.0 or 0.0."""
    return tf.cast(tf.not_equal(labels, problems.IGNORED), tf.float32)


def masked_mean(y_true, y_pred):
    """Returns the mean crossentropy of the tokens that count; a scalar."""
    counts = counted(y_true)
    entries = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(counts > 0, tf.cast(y_true, tf.int32), 0), y_pred
    )
    return tf.reduce_sum(entries * counts) / tf.reduce_sum(counts)


class CountsTokens:
    """A model of keras_accum whose loss is `masked_mean`."""

    def microbatch_weight(self, x, y, y_pred, sample_weight=None):
        """Returns how many tokens count."""
        del x, y_pred, sample_weight
        return tf.reduce_sum(counted(y))


class TwoLosses:
    """A step of "two_losses": a gradient of each loss, each a mean."""

    def gradients(self, data):
        """Returns the gradients and the denominator of each loss."""
        x, (row_labels, token_labels) = data
        # The labels of padding are some class or other.
        counts = tf.cast(tf.not_equal(x, 0), tf.float32)
        crossentropy = tf.nn.sparse_softmax_cross_entropy_with_logits
        with tf.GradientTape(persistent=True) as tape:
            row_logits, token_logits = self(x, training=True)
            row_loss = tf.reduce_mean(crossentropy(row_labels, row_logits))
            token_loss = tf.reduce_sum(
                counts * crossentropy(token_labels, token_logits)
            ) / tf.reduce_sum(counts)
        variables = self.trainable_variables
        return (
            (tape.gradient(row_loss, variables), len_of(x)),
            (tape.gradient(token_loss, variables), tf.reduce_sum(counts)),
        )


class TwoParts:
    """A step of "classifier": a gradient of each part of the rows."""

    def parts(self, data):
        """Returns the batch's first quarter, and the others."""
        x, y = data
        cut = len_of(x) // 4
        return (x[:cut], y[:cut]), (x[cut:], y[cut:])

    def gradients(self, x, y):
        """Returns the gradients of the mean over a part."""
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            )
        return tape.gradient(loss, self.trainable_variables)


class TwoOptimizers:
    """A step of "pair": both gradients are of the same weights.

    Attributes:
        generator_optimizer: That of the generator; the discriminator's is the
            model's own.
    """

    generator_optimizer = None

    def gradients(self, data):
        """Returns pairs of gradients and variables, of each network."""
        with tf.GradientTape(persistent=True) as tape:
            real, fake = self(data[0], training=True)
            theirs = tf.reduce_mean(
                tf.nn.softplus(-real) + tf.nn.softplus(fake)
            )
            its = tf.reduce_mean(tf.nn.softplus(-fake))
        generator = self.get_layer("generator").trainable_variables
        discriminator = [
            variable
            for name in ("hidden", "output")
            for variable in self.get_layer(name).trainable_variables
        ]
        return (
            paired(tape.gradient(theirs, discriminator), discriminator),
            paired(tape.gradient(its, generator), generator),
        )


def len_of(x):
    """Returns the number of rows."""
    return tf.shape(x)[0]


def paired(gradients, variables):
    """Returns pairs of them."""
    return list(zip(gradients, variables, strict=True))


def dense_sum(*gradients):
    """Returns the sum of gradients, some of which may be None or sparse."""
    return tf.add_n(
        [tf.convert_to_tensor(g) for g in gradients if g is not None]
    )


class AccumulatesTwoLosses(TwoLosses):
    """`TwoLosses` in keras_accum: two calls."""

    def train_step(self, data):
        """Accumulates the gradients."""
        (row_gradients, rows), (token_gradients, tokens) = self.gradients(data)
        variables = self.trainable_variables
        self.accumulate(paired(row_gradients, variables), rows)
        self.accumulate(paired(token_gradients, variables), tokens)
        return {"loss": 0.0}


class AccumulatesTwoParts(TwoParts):
    """`TwoParts` in keras_accum: two calls in a loop."""

    def train_step(self, data):
        """Accumulates the gradients."""
        for x, y in self.parts(data):
            gradients = self.gradients(x, y)
            self.accumulate(
                paired(gradients, self.trainable_variables), len_of(x)
            )
        return {"loss": 0.0}


class AccumulatesForTwo(TwoOptimizers):
    """`TwoOptimizers` in keras_accum: a call for each."""

    def train_step(self, data):
        """Accumulates the gradients."""
        discriminating, generating = self.gradients(data)
        rows = len_of(data[0])
        self.accumulate(discriminating, rows)
        self.accumulate(generating, rows, optimizer=self.generator_optimizer)
        return {"loss": 0.0}


class AppliesTwoLosses(TwoLosses):
    """`TwoLosses` for an optimizer: a call of it is one step, so they add."""

    def train_step(self, data):
        """Gives the optimizer the sums."""
        (first, _), (second, _) = self.gradients(data)
        added = [
            dense_sum(*gradients)
            for gradients in zip(first, second, strict=True)
        ]
        self.optimizer.apply_gradients(paired(added, self.trainable_variables))
        return {"loss": 0.0}


class AppliesTwoParts(TwoParts):
    """`TwoParts` for an optimizer: each part is a micro-batch to it."""

    def train_step(self, data):
        """Gives the optimizer both in turn."""
        for x, y in self.parts(data):
            gradients = self.gradients(x, y)
            self.optimizer.apply_gradients(
                paired(gradients, self.trainable_variables)
            )
        return {"loss": 0.0}


class AppliesForTwo(TwoOptimizers):
    """`TwoOptimizers` for optimizers, once both gradients are known."""

    def train_step(self, data):
        """Gives each optimizer its own."""
        discriminating, generating = self.gradients(data)
        self.optimizer.apply_gradients(discriminating)
        self.generator_optimizer.apply_gradients(generating)
        return {"loss": 0.0}


class AveragesInUpdateStep:
    """A model of keras_accum that averages its weights after updates.

    Attributes:
        averages: Of the trainable variables.
    """

    averages, decay = (), 0.0

    def average(self, decay: float) -> None:
        """Begins, with the first weights."""
        self.decay = decay
        self.averages = [tf.Variable(v) for v in self.trainable_variables]

    def update_step(self):
        """Updates, and averages."""
        super().update_step()
        for average, variable in zip(
            self.averages, self.trainable_variables, strict=True
        ):
            average.assign(self.decay * average + (1 - self.decay) * variable)


class AveragesInCallback(keras.callbacks.Callback):
    """Averages the weights after each batch with which the optimizer counted.

    Args:
        model: The model.
        decay: How much of the average stays.

    Attributes:
        averages: Of the trainable variables.
    """

    def __init__(self, model, decay: float) -> None:
        super().__init__()
        self._decay, self._seen = decay, 0
        self.averages = [
            tf.convert_to_tensor(v) for v in model.trainable_variables
        ]

    def on_train_batch_end(self, batch, logs=None):
        """Averages if there was an update."""
        del batch, logs
        updates = int(tf.convert_to_tensor(self.model.optimizer.iterations))
        if updates == self._seen:
            return
        self._seen = updates
        self.averages = [
            self._decay * average + (1 - self._decay) * variable
            for average, variable in zip(
                self.averages, self.model.trainable_variables, strict=True
            )
        ]
