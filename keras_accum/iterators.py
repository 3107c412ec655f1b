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

To end one may take as long as it has lived, up to a minute, since a thread of
TensorFlow's may miss that it should end. For `fit` another thread waits for it.
What `evaluate` and `predict` read from is dropped by Keras, which waits.
"""

import contextlib
import contextvars
import threading
from collections.abc import Iterator

import tensorflow as tf

from keras_accum import compat

OPTIMIZATIONS = ("noop_elimination", "shuffle_and_repeat_fusion", "map_fusion")
# Seconds to wait for an iterator's end, which mostly takes a thousandth.
PATIENCE = 0.1

# The iterator that `fit` reads from, in a list, within `ending`.
_READ: contextvars.ContextVar[list | None] = contextvars.ContextVar(
    "keras_accum_iterator", default=None
)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ends, safely, what Keras begins to iterate over in this thread."""
    begun, read = [], []
    token = _READ.set(read)
    with (
        compat.iterating_over(rewritten),
        compat.recording_epoch_iterators(begun.append),
    ):
        try:
            yield
        finally:
            _READ.reset(token)
            # Nothing may be left in this frame, which would wait for it.
            data = read.copy()
            read.clear()
            for epoch_iterator in begun:
                data += compat.end_epoch(epoch_iterator)
            let_go_of(data)


def read_from(iterator) -> None:
    """Says that `fit` reads from an iterator; the one before it has ended.

    Keras lets go of that, and would wait for its end.
    """
    read = _READ.get()
    if read is None or (read and read[0] is iterator):
        return
    before = read.copy()
    read[:] = [iterator]
    let_go_of(before)


def let_go_of(objects: list) -> None:
    """Empties a list in another thread, and waits for it, but not for long.

    Args:
        objects: What nobody else refers to, or soon will not.
    """
    if not objects:
        return
    thread = threading.Thread(
        target=objects.clear, name="keras_accum_iterators"
    )
    thread.start()
    thread.join(PATIENCE)


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
