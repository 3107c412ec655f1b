"""What `benchmarks.compare` trains: three models, the same in every framework.

No framework is imported here. Each builds them in the way that is usual there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# "MLP": dense layers with ReLU.
FEATURES, LAYERS, CLASSES = 1024, (2048, 2048, 1200), 10
# "transformer": decoder blocks with attention and a layer of 4 x `WIDTH`, GELU,
# each after a layer normalization; there are no positions.
LENGTH, VOCABULARY, WIDTH, HEADS, BLOCKS = 64, 4096, 192, 4, 3
# "convolutional": 3 x 3 convolutions without bias, with these filters and
# strides, each followed by batch normalization and ReLU; then the mean.
IMAGE = (32, 32, 3)
FILTERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))

Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data, and how it is trained.

    Attributes:
        rows: Rows of a micro-batch.
        accum_steps: Micro-batches per window, k.
        optimizer: "adam", "adamw" or "sgd", with the rate and the decay below.
        batch: Returns inputs and integer labels of a number of rows.
    """

    rows: int
    accum_steps: int
    optimizer: str
    batch: Callable[[int], Batch]


LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2


def vectors(rows: int) -> Batch:
    """Returns a batch for the MLP."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    return x, rng.integers(0, CLASSES, rows).astype("int32")


def tokens(rows: int) -> Batch:
    """Returns a batch for the transformer, which predicts the next token."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCABULARY, (rows, LENGTH + 1)).astype("int32")
    return text[:, :-1], text[:, 1:]


def images(rows: int) -> Batch:
    """Returns a batch for the convolutional network; channels come last."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, *IMAGE)).astype("float32")
    return x, rng.integers(0, CLASSES, rows).astype("int32")


CASES = {
    "MLP": Case(4, 8, "adam", vectors),
    "transformer": Case(4, 8, "adamw", tokens),
    "convolutional": Case(8, 4, "sgd", images),
}
