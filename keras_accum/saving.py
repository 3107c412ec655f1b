"""What is saved of a model: its class, and the arguments that are ours."""

import inspect
import weakref
from collections.abc import Mapping
from numbers import Integral
from typing import Any
from typing import Self

import keras

from keras_accum import compat
from keras_accum import counting
from keras_accum import functional
from keras_accum import replicas
from keras_accum import sharing
from keras_accum.checkpoint import WindowCheckpoint
from keras_accum.options import Options

# The key, in a configuration, of the model that `from_model` was given.
MODEL = "from_model"
# The name in checkpoints of what a model has gathered.
CHECKPOINT = "accumulation_window"
# Options that may be functions, or objects that are called.
FUNCTIONS = {"accum_steps", "effective_batch_size", "window_metrics"}


class SavingMixin(compat.CheckpointMixin, compat.ToldOfClones):
    """Configuration, pickling and clones, as `keras.Model` has them."""

    # What the model's checkpoints have of its window.
    _accum_checkpoint: WindowCheckpoint

    @compat.keeps_automatic_config
    def get_config(self) -> dict[str, Any]:
        """Returns the configuration; with our arguments if functional."""
        inner = functional.other_class(type(self))
        config = (
            super().get_config() if inner is None else self._config_as(inner)
        )
        mine = arguments_of(self)
        mine = {name: serialized(value) for name, value in mine.items()}
        takes_all = inner is not None or (
            "input_layers" in config and "output_layers" in config
        )
        # A subclass with a constructor of its own may not take all of them. Of
        # those that are for names alone, Keras knows from 3.9 on.
        taken = config | inspect.signature(type(self).__init__).parameters
        mine = {name: mine[name] for name in mine if takes_all or name in taken}
        return config | mine

    def _config_as(self, inner):
        """Returns the configuration of what `from_model` was given."""
        model = keras.saving.serialize_keras_object(
            sharing.seen_as(self, inner)
        )
        # The whole is built and compiled, not the model inside it.
        for name in ("build_config", "compile_config"):
            model.pop(name, None)
        return {MODEL: model}

    def _children_to_save(self):
        """Returns the window's checkpoint by name; nothing if it is empty."""
        checkpoint = self._accum_checkpoint
        return {} if checkpoint.is_empty() else {CHECKPOINT: checkpoint}

    def _child_to_restore(self, name):
        return self._accum_checkpoint if name == CHECKPOINT else None

    def _record_clone(self, outputs):
        """Records this model as the original of a clone of these `outputs`."""
        for output in outputs:
            output._accum_original = weakref.ref(self)

    @classmethod
    def from_config(cls, config: dict, *args: Any, **kwargs: Any) -> Self:
        """Makes a model from its configuration."""
        config = dict(config)
        for name in FUNCTIONS.intersection(config):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], *args, **kwargs
            )
        if MODEL in config:
            model = keras.saving.deserialize_keras_object(
                config.pop(MODEL), *args, **kwargs
            )
            return cls.from_model(model, **config)
        model = super().from_config(config, *args, **kwargs)
        # A `from_config` behind this one may pass on what it knows alone.
        for name, value in settable(config).items():
            setattr(model, name, value)
        if "accumulator_dtype" in config:
            dtype = config["accumulator_dtype"]
            model._accumulation.change(accumulator_dtype=dtype)
        return model

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """Loads weights, as `keras.Model.load_weights`, or changes nothing.

        Weights from the middle of a window come with what was gathered, and
        the next `fit` goes on with it. With others a new window begins.
        """
        before = replicas.Snapshot(
            self.distribute_strategy,
            [each.value for each in saved_variables(self)],
        )
        try:
            super().load_weights(*args, **kwargs)
        except BaseException:
            before.restore()
            raise

    def __reduce__(self):
        """Pickles a functional model as one of the class that has a name."""
        unpickle, *state = super().__reduce__()
        named = functional.named_class(type(self))
        return getattr(named, unpickle.__name__), *state


def is_saved(metric) -> bool:
    """Returns whether a metric can be found again: a name, or registered.

    Without its metrics a model can be loaded; with an unknown one it cannot.
    """
    name = getattr(metric, "__name__", None)
    return name is None or keras.saving.get_registered_name(metric) != name


def serialized(value):
    """Returns an option as it stands in a configuration."""
    if isinstance(value, tuple):
        return list(map(serialized, filter(is_saved, value)))
    if callable(value):
        return keras.saving.serialize_keras_object(value)
    return int(value) if isinstance(value, Integral) else value


def bytes_to_save(model: keras.Model) -> int:
    """Returns the memory that it takes to save a model as `.keras`.

    Keras makes the file there, unless the weights are large for the machine;
    and has two copies of one variable at a time.
    """
    sizes = [counting.bytes_of([each]) for each in saved_variables(model)]
    return sum(sizes) + 2 * max(sizes, default=0)


def saved_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables of a model and of its optimizer, if it has one."""
    optimizer = getattr(model, "optimizer", None)
    return model.variables + (optimizer.variables if optimizer else [])


def take_original(tensors):
    """Returns the model that a clone is made of, given its outputs; or None.

    It is returned once: other models may be made of the same outputs.
    """
    original = None
    for tensor in keras.tree.flatten(tensors):
        if hasattr(tensor, "_accum_original"):
            original = tensor._accum_original()
            del tensor._accum_original
    return original


def arguments_of(model: keras.Model) -> dict:
    """Returns the arguments that would make a model like this one."""
    arguments = {name: getattr(model, name) for name in Options.names()}
    if arguments["effective_batch_size"] is not None:
        # That is what was solved for.
        arguments["accum_steps"] = 1
    return arguments


def settable(config: Mapping) -> dict:
    """Returns the options in a configuration that may be set at any time.

    Of the options that say how large a window is, only the given one is among
    them: the others would undo it.
    """
    sizes = ("microbatch_size", "effective_batch_size")
    given = [name for name in sizes if config.get(name) is not None]
    names = [*(given or ["accum_steps"]), "partial_window", "nonfinite"]
    names += ["communication_dtype", "window_metrics"]
    return {name: config[name] for name in names if name in config}
