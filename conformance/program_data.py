"""Data for the programs of the suite: made, or shipped with a package."""

import numpy as np
import tensorflow as tf
from sklearn import datasets


def digits(rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of digits, of shape (rows, 8, 8, 1), and their classes."""
    images, classes = datasets.load_digits(return_X_y=True)
    images = (images[:rows] / 16).astype("float32")
    return images.reshape(-1, 8, 8, 1), classes[:rows].astype("int32")


def sentences(
    rows: int = 64, length: int = 12, words: int = 20, seed: int = 0
) -> np.ndarray:
    """Returns sentences of unlike length, padded with 0; (rows, length)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, words, (rows, length))
    lengths = rng.integers(2, length + 1, (rows, 1))
    return (tokens * (np.arange(length) < lengths)).astype("int32")


def table(rows: int = 64, columns: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Returns a table of numbers, and what is to be predicted; (rows, 1)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True)).astype("float32")


def shapes(rows: int = 64, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Returns images with a bright rectangle, and its mask, uneven in size."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.3, (rows, size, size, 1)).astype("float32")
    masks = np.zeros_like(images)
    for row in range(rows):
        top, left = rng.integers(0, size // 2, 2)
        height, width = rng.integers(1, size // 2, 2)
        masks[row, top : top + height, left : left + width] = 1
    return images + masks, masks


def molecules(
    rows: int = 64, features: int = 4
) -> tuple[tf.RaggedTensor, tf.RaggedTensor, np.ndarray]:
    """Returns rings of 3 to 7 atoms, and a label for each.

    Ragged tensors of the atoms, of shape (rows, None, features), and of the
    pairs of neighbors, by their index in the molecule, (rows, None, 2); and
    labels of 0 or 1, (rows, 1).
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 8, rows)
    atoms = rng.normal(size=(sizes.sum(), features)).astype("float32")
    pairs = np.concatenate(
        [
            np.stack([np.arange(n), np.roll(np.arange(n), shift)], axis=1)
            for n in sizes
            for shift in (-1, 1)
        ]
    )
    labels = rng.integers(0, 2, (rows, 1)).astype("float32")
    return (
        tf.RaggedTensor.from_row_lengths(atoms, sizes),
        tf.RaggedTensor.from_row_lengths(pairs, 2 * sizes),
        labels,
    )
