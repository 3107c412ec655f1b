"""What every system is asked to train: in NumPy, with no framework.

A problem says which model, on which micro-batches, and how. A system trains it
twice: on the large batches, without accumulation, and in micro-batches. The
same weights must come out.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

FEATURES, CLASSES, TOKENS, LENGTH, UNITS = 6, 3, 9, 12, 8
# Inputs of the model that shows which units were dropped.
DROPPED = 256
# The label of a token that does not count: PyTorch's convention.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are given to a system at once.

    Attributes:
        x: Inputs, of shape (rows, ...).
        y: Labels, of shape (rows,) or (rows, `LENGTH`), or, for the model
            "two_losses", a pair of these: of rows and of tokens. Tokens that
            are 0 do not count.
        weight: Weights of the rows, of shape (rows,); or None.
    """

    x: np.ndarray
    y: np.ndarray | tuple[np.ndarray, np.ndarray]
    weight: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.x)


def concatenate(batches: list[Batch]) -> Batch:
    """Returns one batch of the rows of all batches."""

    def joined(*arrays):
        if isinstance(arrays[0], tuple):
            return tuple(joined(*pair) for pair in zip(*arrays, strict=True))
        return None if arrays[0] is None else np.concatenate(arrays)

    return Batch(
        joined(*(batch.x for batch in batches)),
        joined(*(batch.y for batch in batches)),
        joined(*(batch.weight for batch in batches)),
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its data, and how it is trained.

    Attributes:
        epochs: The micro-batches of each epoch, in order.
        accum_steps: Micro-batches per window, k. An epoch's last window may
            have fewer.
        steps_by_epoch: k of each epoch, in place of `accum_steps`.
        steps_by_update: k of each window, in place of `accum_steps`; it is a
            schedule that follows the number of updates.
        model: The name of one of the models in `initial_weights`.
        reduction: How the loss, a crossentropy of logits, or for "dropout" a
            squared error, becomes a scalar: "mean", over the rows or the tokens
            that count, where weights multiply the entries; "weighted_mean",
            over the sum of the weights; "sum".
        optimizer: "sgd", "momentum" (0.9), "adam" or "adamw" (decoupled weight
            decay of 0.1 for all weights).
        learning_rate: Its learning rate.
        halving: Whether each update halves the learning rate.
        clip_norm: Largest norm of the gradient, over all weights; or None.
        clip_value: Largest absolute entry of the gradient; or None.
        l2: Times the square of the hidden kernel's norm, added to the loss.
        activity_l2: Times the squares of the hidden units, summed over units,
            averaged over the rows, added to the loss.
        added: A loss of the hidden units that a layer adds, with h_i the mean
            of the squares of row i: "row_mean", the mean of h over the rows;
            "per_row", a value for each, h_i, which add up; "balance", as of a
            mixture of experts, `UNITS` times the sum of the squares of the
            means over the rows of softmax(units). Or None.
        added_scale: Times this.
        is_scalar_function: Whether the loss, a mean over the tokens that count,
            is a function of all labels and outputs that returns a scalar. The
            labels of tokens that do not count are then `IGNORED`.
        step: "whole"; "two_calls", two losses with a backward pass each;
            "two_parts", the loss of each of the batch's `parts` with a backward
            pass each; "two_optimizers", as two calls, each for other weights,
            with an optimizer of its own. The reference is never in parts.
        lookup: Whether an embedding's rows are looked up. Else they are the
            product of one-hot vectors and the embedding, whose gradient is
            dense.
        average: Decay of an exponential moving average of the weights, which
            starts at the first weights; or None.
        average_by_hand: Whether it is the user's own code that averages, once
            per update, and not the optimizer.
        nonnegative: Whether the hidden kernel's entries below 0 become 0 after
            an update.
        dtype: "float32", "float64", "bfloat16", all of these of weights and
            arithmetic alike, or "mixed_float16": weights in float32,
            arithmetic in float16, with a dynamic loss scale.
        nonfinite: "propagate", "skip_microbatch" or "skip_window".
        replicas: How many devices share the rows of each micro-batch.
        xla: Whether XLA compiles.
        resume_after: How many micro-batches are trained on before the run is
            saved, in mid-window, and another goes on from what was saved; or
            None. The reference is the run that is not interrupted.
    """

    epochs: tuple[tuple[Batch, ...], ...]
    accum_steps: int = 4
    steps_by_epoch: tuple[int, ...] | None = None
    steps_by_update: tuple[int, ...] | None = None
    model: str = "classifier"
    reduction: str = "mean"
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    halving: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    l2: float = 0.0
    activity_l2: float = 0.0
    added: str | None = None
    added_scale: float = 1.0
    is_scalar_function: bool = False
    step: str = "whole"
    lookup: bool = True
    average: float | None = None
    average_by_hand: bool = False
    nonnegative: bool = False
    dtype: str = "float32"
    nonfinite: str = "propagate"
    replicas: int = 1
    xla: bool = False
    resume_after: int | None = None

    def windows(self) -> list[list[list[Batch]]]:
        """Returns the micro-batches of each window of each epoch."""
        update, epochs = 0, []
        for index, batches in enumerate(self.epochs):
            windows, position = [], 0
            while position < len(batches):
                size = self.steps_of(index, update)
                windows.append(list(batches[position : position + size]))
                position += size
                update += 1
            epochs.append(windows)
        return epochs

    def steps_of(self, epoch: int, update: int) -> int:
        """Returns k of the window after this number of updates."""
        if self.steps_by_epoch is not None:
            return self.steps_by_epoch[epoch]
        if self.steps_by_update is not None:
            last = len(self.steps_by_update) - 1
            return self.steps_by_update[min(update, last)]
        return self.accum_steps

    def large_batches(self) -> list[list[Batch]]:
        """Returns what the reference is trained on, epoch by epoch.

        Micro-batches or windows that are to be skipped are left out.
        """
        epochs = []
        for windows in self.windows():
            batches = []
            for window in windows:
                kept = [batch for batch in window if is_finite(batch)]
                if self.nonfinite == "propagate":
                    kept = window
                if self.nonfinite == "skip_window" and len(kept) < len(window):
                    kept = []
                if kept:
                    batches.append(concatenate(kept))
            epochs.append(batches)
        return epochs

    def whole_batches(self) -> list[list[Batch]]:
        """Returns each window's rows at once, for systems that split them."""
        return [
            [concatenate(window) for window in windows]
            for windows in self.windows()
        ]

    def microbatches(self) -> Iterator[Batch]:
        """Returns all micro-batches of all epochs."""
        for batches in self.epochs:
            yield from batches

    @property
    def most_rows(self) -> int:
        """Rows of the largest micro-batch."""
        return max(batch.rows for batch in self.microbatches())


def is_finite(batch: Batch) -> bool:
    """Returns whether no input is a NaN or an infinity."""
    return bool(np.all(np.isfinite(batch.x)))


def initial_weights(model: str) -> dict[str, np.ndarray]:
    """Returns the first weights of a model, by name, in float32.

    * "classifier": dense (`UNITS`, tanh), dense (`CLASSES` logits).
    * "tagger": embedding of `TOKENS` tokens in `UNITS`, of which 0 is padding,
      then "classifier" for each token.
    * "two_losses": "tagger", and `CLASSES` logits of the row from the hidden
      units of its first token. The loss is the sum of both.
    * "normalized": batch normalization over the rows (momentum 0.9, epsilon
      1e-3, scale and offset), dense (`CLASSES` logits).
    * "linear": dense (`CLASSES` logits).
    * "dropout": dropout of one half, dense (1 output).
    * "towers": two dense layers, "query" and "key" (`UNITS` each). The loss is
      contrastive: the crossentropy of each row's products of its query and all
      keys of the batch, of which its own is the right one; and the mean.
    * "pair": "generator", dense (`FEATURES`, tanh), and a discriminator, dense
      (`UNITS`, tanh), dense (1 logit), of the rows, which are real, and of what
      the generator makes of them. The discriminator's loss is the crossentropy
      of telling them apart; the generator's, that its rows are called real.
    * "spectral": "classifier", whose hidden kernel is divided by its largest
      singular value, of which each step in training makes one power iteration.
      It begins with `initial_vector`.

    Kernels are of shape (inputs, outputs).
    """
    rng = np.random.default_rng(7)

    def dense(name, inputs, outputs):
        kernel = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
        return {f"{name}_kernel": kernel, f"{name}_bias": np.zeros(outputs)}

    if model in ("classifier", "spectral"):
        weights = dense("hidden", FEATURES, UNITS)
        weights |= dense("output", UNITS, CLASSES)
    elif model in ("tagger", "two_losses"):
        weights = {"embedding": rng.normal(size=(TOKENS, UNITS))}
        weights |= dense("hidden", UNITS, UNITS)
        weights |= dense("output", UNITS, CLASSES)
        if model == "two_losses":
            weights |= dense("row", UNITS, CLASSES)
    elif model == "normalized":
        weights = {"scale": np.ones(FEATURES), "offset": np.zeros(FEATURES)}
        weights |= dense("output", FEATURES, CLASSES)
    elif model == "linear":
        weights = {
            "output_kernel": np.zeros((FEATURES, CLASSES)),
            "output_bias": np.zeros(CLASSES),
        }
    elif model == "towers":
        weights = dense("query", FEATURES, UNITS)
        weights |= dense("key", FEATURES, UNITS)
    elif model == "pair":
        weights = dense("generator", FEATURES, FEATURES)
        weights |= dense("hidden", FEATURES, UNITS)
        weights |= dense("output", UNITS, 1)
    elif model == "dropout":
        weights = {"output_kernel": np.zeros((DROPPED, 1))}
    else:
        raise ValueError(f"There is no model {model!r}.")
    return {name: value.astype("float32") for name, value in weights.items()}


def initial_vector(size: int) -> np.ndarray:
    """Returns the vector with which power iterations begin, of norm 1."""
    vector = np.random.default_rng(3).normal(size=size)
    return (vector / np.linalg.norm(vector)).astype("float32")


def parts(rows):
    """Returns a batch's rows in two parts: the first quarter, and the others.

    Args:
        rows: An array, of any framework.
    """
    cut = len(rows) // 4
    return rows[:cut], rows[cut:]


def vectors(*sizes: int, epochs: int = 3) -> tuple[tuple[Batch, ...], ...]:
    """Returns epochs of micro-batches of these numbers of rows."""
    rng = np.random.default_rng(0)
    return tuple(
        tuple(
            Batch(
                rng.normal(0.5, 1.5, (size, FEATURES)).astype("float32"),
                rng.integers(0, CLASSES, size).astype("int32"),
            )
            for size in sizes
        )
        for _ in range(epochs)
    )


def sequences(
    *lengths: int, rows: int = 2, epochs: int = 3
) -> tuple[tuple[Batch, ...], ...]:
    """Returns epochs of padded sequences, for "tagger".

    Args:
        *lengths: Tokens that count, in each row of each micro-batch.
        rows: Rows of a micro-batch.
        epochs: How many epochs.
    """
    rng = np.random.default_rng(0)

    def batch(length):
        tokens = rng.integers(1, TOKENS, (rows, LENGTH)).astype("int32")
        tokens[:, length:] = 0
        labels = rng.integers(0, CLASSES, (rows, LENGTH)).astype("int32")
        return Batch(tokens, labels)

    return tuple(
        tuple(batch(length) for length in lengths) for _ in range(epochs)
    )


def halves(
    *pairs: tuple[int, int], epochs: int = 3
) -> tuple[tuple[Batch, ...], ...]:
    """Returns `sequences` of two rows, each of a length of its own."""
    rng = np.random.default_rng(0)

    def batch(pair):
        tokens = rng.integers(1, TOKENS, (2, LENGTH)).astype("int32")
        for row, length in enumerate(pair):
            tokens[row, length:] = 0
        labels = rng.integers(0, CLASSES, (2, LENGTH)).astype("int32")
        return Batch(tokens, labels)

    return tuple(tuple(batch(pair) for pair in pairs) for _ in range(epochs))


def with_row_labels(epochs):
    """Returns micro-batches for "two_losses", made of those for "tagger"."""
    rng = np.random.default_rng(1)
    return tuple(
        tuple(
            dataclasses.replace(
                batch,
                y=(
                    rng.integers(0, CLASSES, batch.rows).astype("int32"),
                    batch.y,
                ),
            )
            for batch in batches
        )
        for batches in epochs
    )


def weighted(epochs):
    """Returns the same micro-batches with weights of the rows, from 0 to 4."""
    rng = np.random.default_rng(1)
    return tuple(
        tuple(
            dataclasses.replace(
                batch,
                weight=(4 * rng.uniform(size=batch.rows) ** 3).astype(
                    "float32"
                ),
            )
            for batch in batches
        )
        for batches in epochs
    )


def poisoned(epochs, position: int):
    """Returns the same, with a NaN in one micro-batch of the first epoch."""
    first, *others = epochs
    x = first[position].x.copy()
    x[0, 0] = np.nan
    batch = dataclasses.replace(first[position], x=x)
    first = (*first[:position], batch, *first[position + 1 :])
    return (first, *others)


def ones(windows: int, steps: int) -> tuple[tuple[Batch, ...], ...]:
    """Returns one epoch of micro-batches of one row of ones, for "dropout"."""
    batch = Batch(np.ones((1, DROPPED), "float32"), np.ones((1, 1), "float32"))
    return ((batch,) * (windows * steps),)
