"""What of a window that is not full goes into checkpoints.

With `accum_steps` a checkpoint may be made between two updates. Its weights are
then those of the last update, and what was gathered since has to be with them.
It is no variable of the model: it would be in its summary and its exports, and
in the weights of a `keras.Model`. It is there only if there is anything. With
it are the states of random generators, such as those of Dropout, which Keras
does not save, so that a run goes on as if it had not been interrupted.
"""

import io
import warnings
import weakref
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import moments
from keras_accum import replicas


class WindowCheckpoint(compat.Saveable, tf.train.experimental.PythonState):
    """Reads and writes the window of a model, for Keras and for TensorFlow.

    All values are over all replicas, and may be restored to any number of
    them: the first one gets what there is.

    Args:
        model: A `GradientAccumulationModel`.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = weakref.ref(model)

    def is_empty(self) -> bool:
        """Whether there is nothing that `keras.Model` would not save."""
        model = self._model()
        return not model._accumulating or not (
            self._has_begun() or compat.random_states(model)
        )

    def save_own_variables(self, store) -> None:
        """Writes to a part of a `.keras` or `.weights.h5` file."""
        for name, value in self._values().items():
            store[name] = value

    def load_own_variables(self, store) -> None:
        """Reads what `save_own_variables` wrote, or that there is nothing."""
        self._restore({name: np.asarray(store[name]) for name in store.keys()})

    def serialize(self) -> bytes:
        """Writes to a part of a `tf.train.Checkpoint`."""
        file = io.BytesIO()
        np.savez(file, **self._values())
        return file.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Reads what `serialize` wrote."""
        with np.load(io.BytesIO(string_value), allow_pickle=False) as values:
            self._restore(dict(values))

    def _has_begun(self):
        buffers = self._model()._accum_buffers
        return buffers is not None and int(buffers.count.numpy()) > 0

    def _values(self):
        model = self._model()
        if self.is_empty():
            return {}
        progress, window = model._accum_progress, model._accum_window
        values = {
            f"random_{place}": state
            for place, state in enumerate(compat.random_states(model))
        }
        if progress.batches:
            values |= {"epoch": progress.epoch, "batches": progress.batches}
        if self._has_begun():
            values |= {"position": window.position, "size": window.size}
            # Keras divides losses by the number of replicas.
            number = model.distribute_strategy.num_replicas_in_sync
            values |= model._accum_buffers.state(number)
            if model._accum_moments is not None:
                values |= model._accum_moments.state(places_of_layers(model))
            if model.nonfinite != "propagate":
                counts = model._nonfinite_counts()
                values["nonfinite"] = replicas.total(counts.window)
        return {name: np.asarray(value) for name, value in values.items()}

    def _restore(self, values: Mapping[str, np.ndarray]) -> None:
        model = self._model()
        if "batches" in values:
            progress = model._accum_progress
            progress.load(int(values["epoch"]), int(values["batches"]))
        restore_random_states(model, values)
        window = model._accum_window
        accumulator = None
        if "position" in values:
            accumulator = model._gradient_accumulator()
            # All is looked at before anything changes.
            accumulator.check_state(values)
        model.reset_window()
        if accumulator is None:
            return
        if not model._accumulating or model.microbatch_size:
            warnings.warn(
                f"The checkpoint has {int(values['position'])} micro-batches "
                "of a window that was not full. They are forgotten, since this "
                "model does not accumulate over batches.",
                stacklevel=2,
            )
            return
        window.position.assign(int(values["position"]))
        window.size.assign(int(values["size"]))
        strategy = model.distribute_strategy
        accumulator.restore(values, strategy.num_replicas_in_sync)
        if model._accum_moments is None:
            model._accum_moments = moments.WindowMoments(strategy)
        model._accum_moments.restore(values, compat.normalizations(model))
        if "nonfinite" in values and model.nonfinite != "propagate":
            counts = model._nonfinite_counts()
            replicas.assign_total(strategy, counts.window, values["nonfinite"])
        model._accum_is_restored = True


def restore_random_states(model, values):
    """Restores those that were saved, unless the model has others."""
    states = compat.random_states(model)
    saved = [name for name in values if name.startswith("random_")]
    if len(saved) == len(states):
        for place, state in enumerate(states):
            state.assign(values[f"random_{place}"])


def places_of_layers(model):
    """Where each BatchNormalization is among them, by its `id`."""
    layers = compat.normalizations(model)
    return {id(layer): place for place, layer in enumerate(layers)}
