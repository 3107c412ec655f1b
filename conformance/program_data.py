"""Data for the programs of the suite: made, or shipped with a package."""

import numpy as np
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
