"""Memory and time of a transformer whose layers are computed twice.

    python -m benchmarks.rematerialization_time

The transformer of `compare_models`, with more blocks and a smaller vocabulary,
so that activations count; each block is one layer. In turn, round after round:
nothing computed twice, each layer by itself, and each block at once; and the
same layers in a functional model without blocks, all in a `keras.RematScope`,
which are computed twice in segments. Memory is what XLA plans for the step of a
micro-batch.

Medians of 9 rounds, on two cores, with TensorFlow 2.21.0 and Keras 3.15.1: see
`docs/choosing.md`.
"""

import statistics

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import compare_models as models
from benchmarks import window_time
from keras_accum.each_microbatch import EachMicrobatch
from keras_accum.steps import train_microbatch

BLOCKS = flags.DEFINE_integer("blocks", 6, "Blocks of the transformer.")
TEXTS = flags.DEFINE_integer("texts", 16, "Rows of a micro-batch.")
VOCABULARY = 1024
WIDTH = models.WIDTH


class Block(keras.layers.Layer):
    """A block of the transformer of `compare_models`."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [
            keras.layers.LayerNormalization(),
            keras.layers.MultiHeadAttention(
                models.HEADS, WIDTH // models.HEADS
            ),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(4 * WIDTH, activation="gelu"),
            keras.layers.Dense(WIDTH),
        ]

    def build(self, shape):
        """Makes the variables."""
        first, attention, second, wide, narrow = self.parts
        attention.build(shape, shape)
        for layer in (first, second, wide):
            layer.build(shape)
        narrow.build((*shape[:-1], 4 * WIDTH))
        self.built = True

    def call(self, hidden):
        """Computes the block."""
        first, attention, second, wide, narrow = self.parts
        normal = first(hidden)
        hidden += attention(normal, normal, use_causal_mask=True)
        return hidden + narrow(wide(second(hidden)))


def make_model(twice: str) -> keras.Model:
    """Returns the model.

    Args:
        twice: What is computed twice: "nothing", its "layers" or its "blocks";
            or the "segments" of a model without blocks.
    """
    keras.utils.set_random_seed(0)
    is_flat = twice == "segments"
    with keras.RematScope("full" if is_flat else None):
        inputs = keras.Input((models.LENGTH,), dtype="int32")
        hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(inputs)
        for _ in range(BLOCKS.value):
            block = Block()
            hidden = block.call(hidden) if is_flat else block(hidden)
        hidden = keras.layers.LayerNormalization()(hidden)
        outputs = keras.layers.Dense(VOCABULARY)(hidden)
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, microbatch_size=TEXTS.value
    )
    model.compile(
        keras.optimizers.AdamW(models.LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    if twice == "blocks":
        keras_accum.rematerialize(model, [Block])
    if twice == "layers":
        parts = [
            p for b in model.layers if isinstance(b, Block) for p in b.parts
        ]
        keras_accum.rematerialize(model, parts)
    return model


def planned_bytes(model: keras.Model, batch) -> int:
    """Returns what XLA plans for the step of a micro-batch."""

    def step(is_first, data, **known):
        return train_microbatch(model._accumulation, is_first, data, **known)

    each = EachMicrobatch(model._accumulation, step, True)
    return each.memory_plan(batch, TEXTS.value).planned


def main(argv):
    """Prints the memory and the times."""
    del argv
    rng = np.random.default_rng(0)
    shape = (TEXTS.value, models.LENGTH + 1)
    text = rng.integers(0, VOCABULARY, shape).astype("int32")
    batch = tf.constant(text[:, :-1]), tf.constant(text[:, 1:])
    functions, memory = {}, {}
    for twice in ("nothing", "layers", "blocks", "segments"):
        model = make_model(twice)
        functions[twice] = lambda model=model: model.train_on_batch(*batch)
        functions[twice]()
        memory[twice] = planned_bytes(model, batch)
    times = window_time.in_turn(functions, 9)
    print(f"{'twice':10}{'MiB':>8}{'median ms':>12}{'over nothing':>30}")
    for twice, each in times.items():
        ratio = window_time.ratio(times, twice, "nothing")
        mebibytes, median = memory[twice] / 2**20, 1e3 * statistics.median(each)
        print(f"{twice:10}{mebibytes:8.1f}{median:12.0f}{ratio:>30}")


if __name__ == "__main__":
    app.run(main)
