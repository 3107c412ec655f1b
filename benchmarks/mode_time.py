"""Time of a window by `microbatch_size`, over that by `accum_steps`.

    python -m benchmarks.mode_time

For three models, compiled by XLA and not, both train on the same rows in
micro-batches of the same size, in turn, round after round. With `accum_steps`
the train function is called for each micro-batch, with `microbatch_size` once.

Medians of 15 rounds, k = 8, on two cores, with TensorFlow 2.21.0 and Keras
3.15.1, and the middle half of the rounds:

| | without XLA | XLA |
| --- | --- | --- |
| MLP, 4 rows | 0.87 (0.84 to 0.97) | 0.93 (0.86 to 0.96) |
| transformer, 8 rows | 0.99 (0.83 to 1.01) | 0.96 (0.90 to 1.00) |
| convolutional, 16 rows | 1.00 (0.88 to 1.08) | 0.97 (0.92 to 1.06) |
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import window_time

# Those of `window_time`, and these.
FLAGS = flags.FLAGS

VOCABULARY, LENGTH, WIDTH, HEADS = 4096, 64, 128, 4
IMAGE = (32, 32, 3)


def transformer(cls: type[keras.Model], **kwargs) -> keras.Model:
    """Two decoder blocks of width 128, on 64 of 4,096 tokens."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(2):
        hidden = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(
            hidden, hidden, use_causal_mask=True
        )
        hidden = keras.layers.LayerNormalization()(x)
        hidden = keras.layers.Dense(4 * WIDTH, activation="gelu")(hidden)
        x = x + keras.layers.Dense(WIDTH)(hidden)
    outputs = keras.layers.Dense(VOCABULARY)(
        keras.layers.LayerNormalization()(x)
    )
    return cls(inputs, outputs, **kwargs)


def convolutional(cls: type[keras.Model], **kwargs) -> keras.Model:
    """Four convolutions with BatchNormalization, on images of 32 by 32."""
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input(IMAGE)
    for filters in (32, 32, 64, 64):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(window_time.CLASSES)(x)
    return cls(inputs, outputs, **kwargs)


def vectors(rng, rows):
    """A batch for the MLP."""
    x = rng.normal(size=(rows, window_time.FEATURES)).astype("float32")
    return x, rng.integers(0, window_time.CLASSES, rows)


def tokens(rng, rows):
    """A batch for the transformer."""
    x = rng.integers(0, VOCABULARY, (rows, LENGTH))
    return x.astype("int32"), np.roll(x, -1, axis=1)


def images(rng, rows):
    """A batch for the convolutional network."""
    x = rng.normal(size=(rows, *IMAGE)).astype("float32")
    return x, rng.integers(0, window_time.CLASSES, rows)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data, and the rows of a micro-batch."""

    build: Callable
    batch: Callable
    rows: int


CASES = {
    "MLP": Case(window_time.multilayer_perceptron, vectors, 4),
    "transformer": Case(transformer, tokens, 8),
    "convolutional": Case(convolutional, images, 16),
}


def contestants(
    case: Case, jit_compile: bool, steps: int
) -> dict[str, Callable[[], None]]:
    """Name: a function that trains on one window."""
    cls = keras_accum.GradientAccumulationModel

    def training(rows, calls, **kwargs):
        data = case.batch(np.random.default_rng(0), rows)
        dataset = tf.data.Dataset.from_tensors(data).cache().repeat()
        model = window_time.compile_model(
            case.build(cls, **kwargs), jit_compile
        )
        return window_time.through_train_function(model, iter(dataset), calls)

    return {
        "window": training(case.rows, steps, accum_steps=steps),
        "cut": training(case.rows * steps, 1, microbatch_size=case.rows),
    }


def main(argv):
    """Prints the ratios."""
    del argv
    for name, case in CASES.items():
        for jit_compile in (False, True):
            times = window_time.in_turn(
                contestants(case, jit_compile, FLAGS.accum_steps), FLAGS.rounds
            )
            ratio = window_time.ratio(times, "cut", "window")
            compiled = "XLA" if jit_compile else "no XLA"
            print(f"{name}, {compiled}: cut / window {ratio}", flush=True)


if __name__ == "__main__":
    app.run(main)
