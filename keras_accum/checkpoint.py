"""What checkpoints hold of a window that is not full.

With `accum_steps` a checkpoint may be made between two updates. Its weights are
then those of the last update, and what was gathered since has to be with them.
It is no variable of the model: it would be in its summary and its exports, and
in the weights of a `keras.Model`. It is there only if there is anything. With
it are the states of random generators, such as those of Dropout, which Keras
does not save, so that a run goes on as if it had not been interrupted.
"""

import io
import warnings
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_accum import compat


class WindowCheckpoint(compat.Saveable, tf.train.experimental.PythonState):
    """Reads and writes the window of a model, for Keras and for TensorFlow.

    All values are over all replicas, and may be restored to any number of
    them: the first one gets what there is.

    Args:
        accumulation: What the model accumulates in.
    """

    def __init__(self, accumulation) -> None:
        self._accumulation = accumulation

    def is_empty(self) -> bool:
        """Returns whether there is nothing to save besides a `keras.Model`."""
        accumulation = self._accumulation
        return not accumulation.trains_itself() or not (
            accumulation.window["gradients"].num_microbatches
            # Within an epoch, `BackupAndRestore` goes on where this says.
            or accumulation.progress.batches
            or compat.random_states(accumulation.model)
            or accumulation.window["noise"].known.moments().windows
        )

    def save_own_variables(self, store) -> None:
        """Writes the window into a `.keras` or `.weights.h5` file."""
        for name, value in self._state().items():
            store[name] = value

    def load_own_variables(self, store) -> None:
        """Reads what `save_own_variables` wrote, which may be nothing."""
        self._restore({name: np.asarray(store[name]) for name in store.keys()})

    def serialize(self) -> bytes:
        """Returns the bytes that go into a `tf.train.Checkpoint`."""
        file = io.BytesIO()
        np.savez(file, **self._state())
        return file.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Reads what `serialize` wrote."""
        with np.load(io.BytesIO(string_value), allow_pickle=False) as values:
            self._restore(dict(values))

    def _state(self) -> dict[str, np.ndarray]:
        if self.is_empty():
            return {}
        accumulation = self._accumulation
        progress = accumulation.progress
        values = {
            f"random_{place}": state
            for place, state in enumerate(
                compat.random_states(accumulation.model)
            )
        }
        known = accumulation.window["noise"].known.state()
        if known:
            # A schedule goes on from the size of the last window.
            values |= known | {"size": accumulation.position.read()[1]}
        if progress.batches:
            values |= {"epoch": progress.epoch, "batches": progress.batches}
        if accumulation.window["gradients"].num_microbatches:
            position, size = accumulation.position.read()
            values |= {"position": np.int64(position), "size": np.int64(size)}
            values |= accumulation.window.state()
        return {name: np.asarray(value) for name, value in values.items()}

    def _restore(self, values: Mapping[str, np.ndarray]) -> None:
        accumulation = self._accumulation
        model = accumulation.model
        if "batches" in values:
            progress = accumulation.progress
            progress.load(int(values["epoch"]), int(values["batches"]))
        restore_random_states(model, values)
        if "position" not in values:
            model.reset_window()
            accumulation.window["noise"].restore_known(values)
            if accumulation.options.follows_noise and "size" in values:
                accumulation.position.move_to(0, int(values["size"]))
            return
        # All is looked at before anything changes.
        accumulation.window.check_state(values)
        model.reset_window()
        position = int(values["position"])
        if not accumulation.is_active or accumulation.size.value is not None:
            warnings.warn(
                f"The checkpoint has {position} micro-batches "
                "of a window that was not full. They are forgotten, since this "
                "model does not accumulate over batches.",
                stacklevel=2,
            )
            return
        accumulation.position.move_to(position, int(values["size"]))
        accumulation.window.restore(values)
        accumulation.window["noise"].restore_known(values)
        accumulation.is_restored = True


def restore_random_states(model, values: Mapping[str, np.ndarray]) -> None:
    """Restores the saved random states, unless the model has others."""
    states = compat.random_states(model)
    saved = [name for name in values if name.startswith("random_")]
    if len(saved) == len(states):
        for place, state in enumerate(states):
            state.assign(values[f"random_{place}"])
