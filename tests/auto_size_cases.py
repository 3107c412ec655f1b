"""One training in a process whose address space is limited, for a test.

    python -m tests.auto_size_cases --limit_mib=500 --jit_compile

Prints what came of it, as JSON: the size, the weights, the error.
"""

import functools
import json
import mmap
import pathlib
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum

_LIMIT = flags.DEFINE_integer(
    "limit_mib", None, "What may be allocated beyond what there is before."
)
_ROWS = flags.DEFINE_integer("rows", 256, "Rows of a batch.")
_SIZE = flags.DEFINE_string("size", "auto", "The `microbatch_size`.")
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Whether XLA compiles.")
_LENGTH = flags.DEFINE_list("length", ["512"], "Lengths of the batches' rows.")
_EPOCHS = flags.DEFINE_integer(
    "epochs",
    0,
    "Epochs of `fit` with validation, in a process that has run nothing; 0 for "
    "`train_on_batch`, in one that has its threads.",
)
_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the model.")
_MODEL = flags.DEFINE_enum(
    "model",
    "dense",
    ["dense", "wide", "transformer", "language", "convolutional"],
    "The model: one of few weights, one of many, one that is long to compile, "
    "one of many tokens, or one whose tensors are of many sizes.",
)
_IS_RECOMPUTED = flags.DEFINE_bool(
    "recompute", False, "Whether its layers are computed twice."
)
# Of the transformers: their tokens and blocks.
TRANSFORMERS = {"transformer": (1024, 6), "language": (16384, 2)}
STEPS, WIDTH = 64, 192
# Of the images.
SIDE = 64


def build(layers):
    """Returns the model."""
    keras.utils.set_random_seed(0)
    made = {
        "dense": lambda: dense(layers),
        "wide": wide,
        **{
            name: functools.partial(transformer, *sizes)
            for name, sizes in TRANSFORMERS.items()
        },
        "convolutional": convolutional,
    }
    inputs, outputs = made[_MODEL.value]()
    model = keras_accum.GradientAccumulationModel(
        inputs,
        outputs,
        microbatch_size=int(_SIZE.value)
        if _SIZE.value.isdigit()
        else _SIZE.value,
    )
    if _IS_RECOMPUTED.value:
        keras_accum.rematerialize(
            model,
            [
                layer
                for layer in model.layers
                if not isinstance(layer, keras.layers.InputLayer)
            ],
        )
    return model


def dense(layers):
    """Makes a model of few weights, with 2 MB of activations in 512 steps."""
    inputs = keras.Input((None, 16))
    hidden = keras.layers.Dropout(0.1, seed=1)(inputs)
    for _ in range(layers):
        hidden = keras.layers.Dense(16, activation="tanh")(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    return inputs, keras.layers.Dense(3)(hidden)


def wide():
    """Makes one of 28 million weights."""
    inputs = hidden = keras.Input((64,))
    for _ in range(4):
        hidden = keras.layers.Dense(3072, activation="gelu")(hidden)
    return inputs, keras.layers.Dense(3)(hidden)


def transformer(vocabulary, blocks):
    """Makes one that predicts the next token."""
    inputs = keras.Input((STEPS,), dtype="int32")
    hidden = keras.layers.Embedding(vocabulary, WIDTH)(inputs)
    for _ in range(blocks):
        normal = keras.layers.LayerNormalization()(hidden)
        attention = keras.layers.MultiHeadAttention(4, WIDTH // 4)
        hidden += attention(normal, normal, use_causal_mask=True)
        normal = keras.layers.LayerNormalization()(hidden)
        inner = keras.layers.Dense(4 * WIDTH, activation="gelu")(normal)
        hidden += keras.layers.Dense(WIDTH)(inner)
    hidden = keras.layers.LayerNormalization()(hidden)
    return inputs, keras.layers.Dense(vocabulary)(hidden)


def convolutional():
    """Makes one of 6 million weights, for small images."""
    inputs = hidden = keras.Input((SIDE, SIDE, 3))
    for filters in (32, 64, 128, 256, 512):
        hidden = keras.layers.Conv2D(filters, 3, padding="same")(hidden)
        hidden = keras.layers.BatchNormalization()(hidden)
        hidden = keras.layers.ReLU()(hidden)
        hidden = keras.layers.MaxPooling2D()(hidden)
    hidden = keras.layers.Flatten()(hidden)
    hidden = keras.layers.Dense(2048, activation="relu")(hidden)
    return inputs, keras.layers.Dense(3)(hidden)


def batches():
    """Yields two batches; if the model is dense, two of each length."""
    rng = np.random.default_rng(0)
    if _MODEL.value in TRANSFORMERS:
        vocabulary, _ = TRANSFORMERS[_MODEL.value]
        for _ in range(2):
            text = rng.integers(
                0, vocabulary, (_ROWS.value, STEPS + 1), "int32"
            )
            yield text[:, :-1], text[:, 1:]
        return
    shapes = [(int(length), 16) for length in _LENGTH.value]
    if _MODEL.value == "convolutional":
        shapes = [(SIDE, SIDE, 3)]
    elif _MODEL.value == "wide":
        shapes = [(64,)]
    for shape in shapes:
        for _ in range(2):
            yield (
                rng.normal(size=(_ROWS.value, *shape)).astype("float32"),
                rng.integers(0, 3, _ROWS.value),
            )


def fit(model, data):
    """Trains on a data set, evaluates and saves; returns the losses."""
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(data),
        output_signature=tuple(
            tf.TensorSpec(each.shape, each.dtype) for each in data[0]
        ),
    ).apply(tf.data.experimental.assert_cardinality(len(data)))
    with tempfile.TemporaryDirectory() as folder:
        history = model.fit(
            dataset.prefetch(2),
            validation_data=dataset,
            epochs=_EPOCHS.value,
            callbacks=[
                keras.callbacks.ModelCheckpoint(f"{folder}/model.keras")
            ],
            verbose=0,
        )
    return history.history["loss"]


def address_space():
    """Returns the bytes of this process's address space."""
    statm = pathlib.Path("/proc/self/statm").read_text(encoding="utf-8")
    return int(statm.split()[0]) * mmap.PAGESIZE


def main(argv):
    """Trains, and prints the outcome."""
    del argv
    data = list(batches())
    model = build(_LAYERS.value)
    model.compile(
        # Not Adam, which divides by a gradient, and amplifies its rounding.
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=_JIT_COMPILE.value,
    )
    model.optimizer.build(model.trainable_variables)
    if not _EPOCHS.value:
        # Threads, with their stacks, are made on first use.
        small = tf.ones((2, 64, 64)) @ tf.ones((2, 64, 64))
        tf.function(lambda x: tf.reduce_sum(x), jit_compile=True)(small)
        model.predict_on_batch(data[0][0][:1])
    variables = [
        *model.variables,
        *model.metrics_variables,
        *model.optimizer.variables,
    ]
    before = [v.numpy() for v in variables]
    if _LIMIT.value is not None:
        # Not all systems have the module.
        import resource

        limit = address_space() + _LIMIT.value * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcome = {"error": None, "losses": []}
    try:
        if _EPOCHS.value:
            outcome["losses"] += fit(model, data)
        else:
            for x, y in data:
                outcome["losses"].append(float(model.train_on_batch(x, y)[0]))
    except tf.errors.ResourceExhaustedError as error:
        outcome["error"] = error.message
    outcome["size"] = model.microbatch_size
    outcome["updates"] = int(model.optimizer.iterations)
    outcome["is_untouched"] = all(
        np.array_equal(v.numpy(), b)
        for v, b in zip(variables, before, strict=True)
    )
    if _MODEL.value == "dense":
        # Those of others take more as numbers than as tensors.
        outcome["weights"] = [w.tolist() for w in model.get_weights()]
    json.dump(outcome, sys.stdout)
    print()


if __name__ == "__main__":
    app.run(main)
