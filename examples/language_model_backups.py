"""Saving a training after every epoch, and going on from there.

`keras.callbacks.BackupAndRestore` does that for one process. Here the workers
of a training share the folder, and a training that is killed while it saves
goes on from what it saved before.
"""

import os
import pathlib
import re
import sys
import tempfile
import warnings

import keras
import tensorflow as tf

_SAVED = "epoch-{:05d}.weights.h5"
_SAVED_PATTERN = re.compile(r"epoch-(\d{5})\.weights\.h5")


class Backups(keras.callbacks.Callback):
    """Saves the weights and the optimizer's state after every epoch.

    All workers save, since the state of some variables is spread over them,
    each in a temporary folder. Only the chief's file is kept.

    Args:
        folder: Where to save. All workers must see the same one.
        keep: Whether this is the chief.
    """

    def __init__(self, folder: str, keep: bool = True):
        super().__init__()
        self._folder = pathlib.Path(folder)
        self._keep = keep

    def on_epoch_end(self, epoch, logs=None):
        """Saves, and forgets the epochs before."""
        self._folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix="saving-", dir=self._folder
        ) as temporary:
            path = pathlib.Path(temporary, "new.weights.h5")
            self.model.save_weights(path)
            if self._keep:
                older = saved_epochs(self._folder)
                # At once: there is always a whole file under such a name.
                os.replace(path, self._folder / _SAVED.format(epoch + 1))
                for each in older - {epoch + 1}:
                    os.remove(self._folder / _SAVED.format(each))


def saved_epochs(folder: str | pathlib.Path) -> set[int]:
    """Returns the epochs after which something was saved in the folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = map(_SAVED_PATTERN.fullmatch, names)
    return {int(match[1]) for match in matches if match}


def restore(model: keras.Model, folder: str) -> int:
    """Restores what was saved last, if anything was.

    Args:
        model: The model, with its optimizer built.
        folder: Where it was saved.

    Returns:
        How many epochs it had been trained for; 0 if nothing was saved.

    Raises:
        SystemExit: If what is saved there is not of this model.
    """
    done = max(saved_epochs(folder), default=0)
    if done:
        path = os.path.join(folder, _SAVED.format(done))
        try:
            with warnings.catch_warnings():
                # Keras warns of layers that it does not find.
                warnings.simplefilter("error", UserWarning)
                model.load_weights(path)
        except (ValueError, KeyError, OSError, UserWarning) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            sys.exit(
                f"--checkpoint_dir={folder} cannot be used: {path} is not"
                f" of this model ({reason}). Name another folder."
            )
    return done


def check_agreement(strategy: tf.distribute.Strategy, done: int) -> None:
    """Checks that all workers go on from the same epoch.

    Workers that do not see the same folder would train for different times, and
    the others would wait for them.

    Args:
        strategy: What the workers have in common.
        done: The epoch after which this worker goes on.

    Raises:
        SystemExit: If another worker goes on after another one.
    """

    @tf.function
    def mean():
        epochs = strategy.run(lambda: tf.constant(float(done)))
        return strategy.reduce("MEAN", epochs, axis=None)

    if float(mean()) != done:
        sys.exit(
            "--checkpoint_dir must be a folder that all workers share: this one"
            f" found epoch {done} there, and others another one."
        )
