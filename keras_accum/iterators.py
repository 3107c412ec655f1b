"""The iterators over data that Keras makes: when they end, and how.

Under a strategy Keras drops iterators that a thread of TensorFlow's still
fetches a batch from. TensorFlow waits for the thread, but has let go of the
dataset before. That lives on if TensorFlow rewrote it for the iterator, as it
does by default. Keras switches that off for arrays; then the process dies of a
segmentation fault, now and then, where cores are busy. So all data of a
strategy are rewritten here. `docs/tensorflow_report.md` has the whole story,
and a program of TensorFlow alone that dies.

An epoch that does not run to its end leaves an iterator that only Python's
collector would find, with threads and batches, at any time: while a function is
traced, say. Here it ends with the `fit` that made it.
"""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from keras_accum import compat

OPTIMIZATIONS = ("noop_elimination", "shuffle_and_repeat_fusion", "map_fusion")


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ends, safely, what Keras begins to iterate over in this thread."""
    begun = []
    with (
        compat.iterating_over(rewritten),
        compat.recording_epoch_iterators(begun.append),
    ):
        try:
            yield
        finally:
            for epoch_iterator in begun:
                compat.end_epoch(epoch_iterator)


def rewritten(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a dataset of the same data that TensorFlow rewrites."""
    given = dataset.options().experimental_optimization
    options = tf.data.Options()
    # Any will do, and these change least. TensorFlow warns of one that is
    # switched on where somebody has switched it off.
    names = [
        name for name in OPTIMIZATIONS if getattr(given, name) is not False
    ]
    name = (names or OPTIMIZATIONS)[0]
    setattr(options.experimental_optimization, name, True)
    return dataset.with_options(options)
