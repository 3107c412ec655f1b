"""What goes wrong without this library: the table of the README.

    python -m benchmarks.faults

Each row trains one small model in three ways, from the same weights on the same
rows: on the large batch in plain `keras.Model`, which is what both others are
meant to equal; on its micro-batches with Keras's own
`gradient_accumulation_steps`; and on these with `GradientAccumulationModel`.

The error is the distance between the weights and those of the large batch, over
the distance that the large batch moved them (2-norms over all weights). Rows
that are about something else say so.
"""

import dataclasses
import warnings
from collections.abc import Callable

import keras
import numpy as np
from absl import app

import keras_accum

FEATURES, CLASSES, TOKENS, LENGTH = 6, 3, 9, 12

Batch = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: What the row is about.
        windows: Micro-batches of each window.
        build: Makes the model, from a model class and its keywords.
        loss: Makes the loss.
        optimizer: Makes the optimizer, from its keywords.
        epoch: If true, the windows are one epoch of `fit`, and run twice; if
            not, they are given to `train_on_batch`.
        accum_steps: k, where the first window does not have k micro-batches.
        weights: What is compared: a function of the model.
    """

    name: str
    windows: list[list[Batch]]
    build: Callable[..., keras.Model]
    loss: Callable[[], keras.Loss]
    optimizer: Callable[..., keras.Optimizer]
    epoch: bool = False
    accum_steps: int | None = None
    weights: Callable[[keras.Model], list[np.ndarray]] = lambda model: (
        model.get_weights()
    )

    @property
    def k(self) -> int:
        """Micro-batches per window."""
        return self.accum_steps or len(self.windows[0])


def classifier(cls: type[keras.Model], **kwargs) -> keras.Model:
    """A small classifier of vectors."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    return cls(inputs, keras.layers.Dense(CLASSES)(hidden), **kwargs)


def tagger(cls: type[keras.Model], **kwargs) -> keras.Model:
    """A model that labels the tokens of padded sequences."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(TOKENS, 8, mask_zero=True)(tokens)
    hidden = keras.layers.LSTM(8, return_sequences=True)(hidden)
    return cls(tokens, keras.layers.Dense(CLASSES)(hidden), **kwargs)


def crossentropy(**kwargs) -> Callable[[], keras.Loss]:
    """Makes the loss of all cases."""
    return lambda: keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **kwargs
    )


def sgd(**kwargs) -> keras.Optimizer:
    """The optimizer of the cases that are not about optimizers."""
    return keras.optimizers.SGD(0.1, **kwargs)


def vectors(*sizes: int, windows: int = 3) -> list[list[Batch]]:
    """Windows of micro-batches of these sizes."""
    rng = np.random.default_rng(0)
    return [
        [
            (
                rng.normal(size=(size, FEATURES)).astype("float32"),
                rng.integers(0, CLASSES, size),
            )
            for size in sizes
        ]
        for _ in range(windows)
    ]


def sequences(*lengths: int) -> list[list[Batch]]:
    """Three windows of micro-batches of padded sequences."""
    rng = np.random.default_rng(0)

    def batch(length):
        tokens = rng.integers(1, TOKENS, (2, LENGTH))
        tokens[:, length:] = 0
        return tokens, rng.integers(0, CLASSES, (2, LENGTH))

    return [[batch(length) for length in lengths] for _ in range(3)]


def weighted(windows: list[list[Batch]]) -> list[list[Batch]]:
    """The same, with sample weights between 0 and 4."""
    rng = np.random.default_rng(1)
    return [
        [
            (x, y, (4 * rng.uniform(size=len(x)) ** 3).astype("float32"))
            for x, y in window
        ]
        for window in windows
    ]


def average(model: keras.Model) -> list[np.ndarray]:
    """The exponential moving average of the weights."""
    optimizer = model.optimizer
    averages = {
        v.path: v.numpy()
        for v in optimizer.variables
        if v.path.endswith("_average")
    }
    return list(averages.values())


CASES = [
    Case(
        "micro-batches of 9, 9, 9 and 1 rows",
        vectors(9, 9, 9, 1),
        classifier,
        crossentropy(),
        sgd,
    ),
    Case(
        "masked tokens, lengths 12, 3, 2, 1",
        sequences(12, 3, 2, 1),
        tagger,
        crossentropy(),
        sgd,
    ),
    Case(
        '`reduction="mean_with_sample_weight"`',
        weighted(vectors(4, 4, 4, 4)),
        classifier,
        crossentropy(reduction="mean_with_sample_weight"),
        sgd,
    ),
    Case(
        '`reduction="sum"`',
        vectors(4, 4, 4, 4),
        classifier,
        crossentropy(reduction="sum"),
        sgd,
    ),
    Case(
        "7 micro-batches an epoch, k = 4",
        [[*vectors(8, 8, 8, 8)[0]], [*vectors(8, 8, 8)[1]]],
        classifier,
        crossentropy(),
        sgd,
        epoch=True,
    ),
    Case(
        "7 micro-batches an epoch, k = 16",
        vectors(*[8] * 7, windows=1),
        classifier,
        crossentropy(),
        sgd,
        epoch=True,
        accum_steps=16,
    ),
    Case(
        "learning-rate schedule over updates",
        vectors(4, 4, 4, 4, windows=6),
        classifier,
        crossentropy(),
        lambda **kwargs: keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.1, 12), **kwargs
        ),
    ),
    Case(
        "moving average of the weights",
        vectors(4, 4, 4, 4, windows=6),
        classifier,
        crossentropy(),
        lambda **kwargs: sgd(use_ema=True, ema_momentum=0.9, **kwargs),
        weights=average,
    ),
]


def concatenate(window: list[Batch]) -> Batch:
    """One batch of the rows of all."""
    return tuple(np.concatenate(parts) for parts in zip(*window, strict=True))


def train(case: Case, model: keras.Model, windows: list[list[Batch]], **kwargs):
    """Weights after training on these windows, batch by batch."""
    model.compile(case.optimizer(**kwargs), loss=case.loss())
    batches = [batch for window in windows for batch in window]
    if case.epoch:
        inputs = Epoch(batches)
        model.fit(inputs, epochs=2, verbose=0, shuffle=False)
    else:
        for batch in batches:
            model.train_on_batch(*batch)
    return case.weights(model)


class Epoch(keras.utils.PyDataset):
    """Batches of any sizes, in order."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self._batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        """One batch."""
        return self._batches[index]


def norm(arrays: list[np.ndarray]) -> float:
    """2-norm over all arrays."""
    return float(np.sqrt(sum(np.sum(a.astype("float64") ** 2) for a in arrays)))


def errors(case: Case) -> tuple[float, float]:
    """The error of Keras's own accumulation, and of this library."""
    model = case.build(keras.Model)
    initial = model.get_weights()
    large = [[concatenate(window)] for window in case.windows]
    expected = train(case, model, large)
    of_keras = train(
        case,
        case.build(keras.Model),
        case.windows,
        gradient_accumulation_steps=case.k,
    )
    of_ours = train(
        case,
        case.build(keras_accum.GradientAccumulationModel, accum_steps=case.k),
        case.windows,
    )
    moved = norm([e - i for e, i in zip(expected, initial, strict=True)])
    return tuple(
        norm([a - e for a, e in zip(actual, expected, strict=True)]) / moved
        for actual in (of_keras, of_ours)
    )


def main(argv):
    """Prints the table in Markdown."""
    del argv
    warnings.simplefilter("ignore")
    print(f"keras {keras.__version__}, keras_accum {keras_accum.__version__}\n")
    print("| | Keras's own | keras_accum |")
    print("| --- | ---: | ---: |")
    for case in CASES:
        of_keras, of_ours = errors(case)
        print(f"| {case.name} | {of_keras:.1%} | {of_ours:.0e} |")


if __name__ == "__main__":
    app.run(main)
