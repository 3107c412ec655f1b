"""Fits that drop iterators in every way; for `iterators_test` and the night.

    python -m tests.iterators_cases one_device 300

trains so often, in a process that no test would survive if it died. Where the
C library overwrites memory that was let go of (see `iterators_test.DETECTING`),
it dies much sooner of what it should not touch.
"""

import contextlib
import functools
import sys
import threading

import keras
import numpy as np
import tensorflow as tf

import keras_accum
from tests import test_utils

# Rows are wide, so that a batch of them takes long to fetch.
ROWS, BATCH, FEATURES, CLASSES = 14, 7, 100_000, 3


class Interruption(Exception):
    """What a callback raises."""


class Raising(keras.callbacks.Callback):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def on_train_batch_end(self, batch, logs=None):
        # A new one: its traceback refers to what has the iterator.
        raise self._error


class Stopping(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = True


def arrays():
    rng = np.random.default_rng(0)
    x = rng.random((ROWS, FEATURES), "float32")
    return x, rng.integers(0, CLASSES, ROWS)


def generated():
    """Returns endless rows, out of Python."""

    def rows():
        x, y = arrays()
        while True:
            yield x[0].copy(), y[0]

    return tf.data.Dataset.from_generator(
        rows,
        output_signature=(
            tf.TensorSpec((FEATURES,)),
            tf.TensorSpec((), tf.int64),
        ),
    ).batch(BATCH)


def endless():
    """Returns endless rows, which TensorFlow is told not to rewrite."""
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    data = tf.data.Dataset.from_tensor_slices(arrays()).repeat().batch(BATCH)
    return data.with_options(options)


def compiled(cls):
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Reshape((4, -1))(inputs)
    hidden = keras.layers.GlobalAveragePooling1D(data_format="channels_first")(
        hidden
    )
    model = cls(inputs, keras.layers.Dense(CLASSES)(hidden))
    model.compile("sgd", test_utils.crossentropy(), jit_compile=False)
    return model


def run(model, data):
    """Leaves an iterator in each way."""
    x, y = arrays()
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=2,
        verbose=0,
        validation_data=(x, y),
        validation_batch_size=BATCH,
    )
    model.evaluate(x, y, BATCH, verbose=0)
    model.predict(x, BATCH, verbose=0)
    model.predict(x, BATCH, steps=1, verbose=0)
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[Stopping()])
    for error in (Interruption, KeyboardInterrupt):
        with contextlib.suppress(error):
            model.fit(x, y, batch_size=2, verbose=0, callbacks=[Raising(error)])
    for each in data:
        model.fit(each, steps_per_epoch=2, verbose=0)
        model.evaluate(each, steps=1, verbose=0)


def main(strategy, rounds, *options):
    strategy = test_utils.STRATEGIES[strategy]()
    data = [endless(), generated()]
    cls = keras_accum.GradientAccumulationModel
    make = functools.partial(cls, accum_steps=2)
    with strategy.scope():
        models = [
            compiled(keras.Model if "plain" in options else make)
            for _ in range(2 if "threads" in options else 1)
        ]

    def repeat(model):
        for _ in range(int(rounds)):
            run(model, data)

    threads = [
        threading.Thread(target=repeat, args=(model,)) for model in models[1:]
    ]
    for thread in threads:
        thread.start()
    repeat(models[0])
    for thread in threads:
        thread.join()
    print("lived")


if __name__ == "__main__":
    main(*sys.argv[1:])
