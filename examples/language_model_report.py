"""What came of a training of the language model example.

It is computed by one process and one device, however many have trained: with a
copy of the model that no strategy knows.
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from examples import language_model_network
from examples import language_model_text

_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How well held-out text is predicted, and how well without a model.

    Args:
        loss: Nats per token.
        bits_per_byte: The same in bits, per byte of text.
        unigram: Nats per token if each is predicted by how often it is in the
            text that was trained on.
    """

    loss: float
    bits_per_byte: float
    unigram: float

    def __str__(self) -> str:
        return (
            f"Held-out loss: {self.loss:.3f} nats per token,"
            f" {self.bits_per_byte:.3f} bits per byte\n"
            f"Unigram entropy: {self.unigram:.3f} nats per token"
        )


def local_copy(
    model: keras.Model, shape: language_model_network.Shape
) -> keras.Model:
    """Returns a `keras.Model` with the same weights, outside any strategy."""
    copy = language_model_network.build_model(shape)
    copy.set_weights(model.get_weights())
    return copy


def unigram_entropy(
    train: language_model_text.Rows, held_out: language_model_text.Rows
) -> float:
    """Returns the cross-entropy of tokens under their frequency in training.

    Args:
        train: Where the frequencies are from. One is added to each count.
        held_out: What is predicted.

    Returns:
        Nats per token.
    """
    counts, targets = (
        np.bincount(
            rows.targets.ravel(),
            rows.weights.ravel(),
            minlength=language_model_text.VOCABULARY_SIZE,
        )
        for rows in (train, held_out)
    )
    frequency = (counts + 1) / np.sum(counts + 1)
    return -float(np.sum(targets * np.log(frequency)) / np.sum(targets))


def evaluate(
    model: keras.Model,
    train: language_model_text.Rows,
    held_out: language_model_text.Rows,
) -> HeldOut:
    """Compares the model with the frequency of tokens, on held-out rows."""

    @tf.function(reduce_retracing=True)
    def summed_loss(inputs, targets, weights):
        losses = keras.ops.sparse_categorical_crossentropy(
            targets, model(inputs, training=False), from_logits=True
        )
        return tf.reduce_sum(losses * weights)

    total = 0.0
    for begin in range(0, len(held_out), _BATCH_SIZE):
        some = slice(begin, begin + _BATCH_SIZE)
        total += float(
            summed_loss(
                held_out.inputs[some],
                held_out.targets[some],
                held_out.weights[some],
            )
        )
    separators = np.sum(held_out.targets == language_model_text.SEPARATOR)
    return HeldOut(
        loss=total / held_out.tokens,
        bits_per_byte=total / math.log(2) / int(held_out.tokens - separators),
        unigram=unigram_entropy(train, held_out),
    )


def sample(
    model: keras.Model, length: int, temperature: float, seed: int
) -> str:
    """Returns a text that the model makes up, from the separator on.

    Args:
        model: From tokens to the logits of the next ones.
        length: Tokens to make up.
        temperature: What divides the logits; with 0 the likeliest token
            follows.
        seed: Decides the draws.
    """
    (_, context) = model.input_shape
    rng = np.random.default_rng(seed)
    predict = tf.function(model)
    tokens = [language_model_text.SEPARATOR]
    for _ in range(length):
        seen = tokens[-context:]
        # Nothing looks at what follows it, so padding at the end is not seen.
        row = np.pad(seen, (0, context - len(seen))).astype(np.int32)
        logits = predict(row[np.newaxis])[0, len(seen) - 1].numpy()
        if temperature:
            # The largest of logits with Gumbel noise is a draw from softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        tokens.append(int(np.argmax(logits)))
    return language_model_text.decode(tokens[1:])


def printable(text: str) -> str:
    """Replaces what a terminal might obey, which bytes by chance may be."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\ufffd" for c in text
    )
