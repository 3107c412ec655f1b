"""One training that is killed after some batches, for a test.

    python -m tests.checkpoint_cases --backups=/tmp/backup --batches=1

Goes on where the last one was killed, and saves the weights at the end.
"""

import os
import pathlib
import signal

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum

BATCHES, EPOCHS, ROWS = 4, 2, 2

_BACKUPS = flags.DEFINE_string("backups", None, "Where backups are kept.")
_BATCHES = flags.DEFINE_integer("batches", None, "Batches until it is killed.")
_POLICY = flags.DEFINE_string("partial_window", "flush", "The model's.")


class Killed(keras.callbacks.Callback):
    """Ends the process after `batches` batches, as a loss of power would.

    It comes after the backup.
    """

    def __init__(self, batches):
        super().__init__()
        self._batches = batches

    def on_train_batch_begin(self, batch, logs=None):
        # Skipped batches are no batches of this process.
        self._batches -= not self.model._accumulation.progress.to_skip

    def on_train_batch_end(self, batch, logs=None):
        if not self._batches:
            os.kill(os.getpid(), signal.SIGKILL)


def build(rate=0.3, **arguments):
    """Returns a model in which everything has state, unless `rate` is None."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(5)(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    if rate is not None:
        hidden = keras.layers.Dropout(rate, seed=3)(hidden)
    model = keras_accum.GradientAccumulationModel(
        inputs, keras.layers.Dense(2)(hidden), **arguments
    )
    model.compile(
        keras.optimizers.Adam(0.1), "mse", metrics=["mae"], jit_compile=False
    )
    return model


def dataset(skip=0):
    """Returns batches of rows that differ from each other."""
    rng = np.random.default_rng(0)
    rows = BATCHES * ROWS
    x = rng.normal(size=(rows, 3)).astype("float32")
    y = rng.normal(size=(rows, 2)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(ROWS).skip(skip)


def train(model, callbacks=()):
    """Trains for all epochs."""
    model.fit(
        dataset(),
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def state(model):
    """Returns all that is to be the same in the end."""
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def main(argv):
    """Trains, until the end or until it is killed."""
    del argv
    folder = pathlib.Path(_BACKUPS.value)
    model = build(accum_steps=3, partial_window=_POLICY.value)
    backup = keras.callbacks.BackupAndRestore(
        folder / "backup", save_freq=1, delete_checkpoint=False
    )
    callbacks = [backup]
    if _BATCHES.value:
        callbacks.append(Killed(_BATCHES.value))
    train(model, callbacks)
    np.savez(folder / "state.npz", *state(model))


if __name__ == "__main__":
    app.run(main)
