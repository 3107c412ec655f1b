"""The text of the language model example: documents, tokens, rows and batches.

The text is Python's own reference, which every Python has for `help()`: some 80
documents of 40 to 40,000 bytes, which differ a little between its versions. A
token is a byte, or the separator that begins and ends every document.
"""

import dataclasses
from collections.abc import Sequence
from pydoc_data import topics

import numpy as np
import tensorflow as tf

SEPARATOR = 256
VOCABULARY_SIZE = 257

_HELD_OUT_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a model trains on: each token is the target of those before it.

    Args:
        inputs: Tokens, int32 of shape `(rows, context)`.
        targets: The tokens that follow, of the same shape.
        weights: 1 for a target and 0 for padding, float32 of the same shape.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """The number of targets that are not padding."""
        return int(self.weights.sum())


def documents() -> tuple[list[str], list[str]]:
    """Returns documents to train on, and others to test with.

    The reference repeats whole sections in several documents. A paragraph is
    left out where an earlier document has it, so that none is in both lists.
    """
    seen, unique = set(), []
    for _, text in sorted(topics.topics.items()):
        paragraphs = text.split("\n\n")
        unique.append("\n\n".join(p for p in paragraphs if p not in seen))
        seen.update(paragraphs)
    unique = [text for text in unique if text.strip()]
    train = [d for i, d in enumerate(unique) if (i + 1) % _HELD_OUT_EVERY]
    return train, unique[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]


def encode(text: str) -> np.ndarray:
    """Returns the text's tokens: its bytes in UTF-8."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: Sequence[int]) -> str:
    """Returns the text of tokens; separators become empty lines."""
    text = b"".join(
        b"\n\n" if token == SEPARATOR else bytes([token]) for token in tokens
    )
    return text.decode(errors="replace")


def packed(texts: Sequence[str], context: int) -> Rows:
    """Splits one document after the other into rows; only the last has padding.

    A row may hold the end of a document and the beginning of the next. The
    model learns from the separator to forget the first.

    Args:
        texts: Documents.
        context: Tokens in a row.
    """
    stream = [SEPARATOR]
    for text in texts:
        stream.extend([*encode(text), SEPARATOR])
    return _split([np.array(stream)], context)


def masked(texts: Sequence[str], context: int) -> Rows:
    """Returns each document in rows of its own, the last of which has padding.

    Args:
        texts: Documents.
        context: Tokens in a row.
    """
    return _split(
        [np.array([SEPARATOR, *encode(text), SEPARATOR]) for text in texts],
        context,
    )


def _split(streams, context):
    """Splits streams into rows; a row's last target begins the next."""
    rows = {"inputs": [], "targets": [], "weights": []}
    for stream in streams:
        padding = -(len(stream) - 1) % context
        for name, values in (
            ("inputs", stream[:-1]),
            ("targets", stream[1:]),
            ("weights", np.ones(len(stream) - 1)),
        ):
            rows[name].append(np.pad(values, (0, padding)))
    types = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
    return Rows(
        **{
            name: np.concatenate(rows[name])
            .reshape(-1, context)
            .astype(types[name])
            for name in types
        }
    )


BATCHINGS = {"packed": packed, "masked": masked}


def batches(
    rows: Rows, batch_size: int, first: int, last: int, seed: int
) -> tf.data.Dataset:
    """Returns batches of an endless stream; each pass has its own order.

    Where a row comes in the stream is computed, not remembered: a training that
    goes on sees what it would have seen without the interruption, and so does
    one with other micro-batches.

    Args:
        rows: The rows, all of which every pass has once.
        batch_size: Rows in a batch, on all replicas together.
        first: Which batch of the stream is the first.
        last: Which is the first that is not wanted.
        seed: Decides the orders.

    Returns:
        `(inputs, targets, weights)` of one static shape each.
    """
    seed = tf.constant(seed, tf.int64)
    arrays = [
        tf.constant(array)
        for array in (rows.inputs, rows.targets, rows.weights)
    ]

    def row(position):
        index = tf.random.experimental.index_shuffle(
            position % len(rows),
            seed=tf.stack([seed, position // len(rows)]),
            max_index=len(rows) - 1,
        )
        return tuple(array[index] for array in arrays)

    dataset = (
        tf.data.Dataset.range(first * batch_size, last * batch_size)
        .map(row, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )
    # Every worker takes its share of each batch. There are no files to share.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options)
