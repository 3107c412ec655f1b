"""The classes of models, and what is saved of them."""

import copy
import weakref

import keras
from keras.src.models.functional import Functional
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import python_utils

# The name of `CheckpointMixin`'s part in checkpoints.
CHECKPOINT = "accumulation_window"


def functional_class() -> type[keras.Model]:
    """The class of models that are built from inputs and outputs.

    `keras.Model(inputs, outputs)` returns one; it has no public name.
    """
    return Functional


class Saveable(KerasSaveable):
    """What has a part of its own in the files of the model that it is of."""

    def _obj_type(self):
        return "Loss"  # One that has no parts.


class CheckpointMixin:
    """A model whose `_accum_checkpoint` is part of TensorFlow's checkpoints.

    Only if it is not empty, so that all others are those of `keras.Model`; and
    not of what is exported.
    """

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        children = super()._trackable_children(save_type, **kwargs)
        own = self._accum_checkpoint
        if save_type == "checkpoint" and not own.is_empty():
            children = children | {CHECKPOINT: own}
        return children

    def _lookup_dependency(self, name, *args, **kwargs):
        if name == CHECKPOINT:
            return self._accum_checkpoint
        return super()._lookup_dependency(name, *args, **kwargs)


def set_untracked(owner, name, value) -> None:
    """Sets an attribute that Keras and TensorFlow do not look at."""
    object.__setattr__(owner, name, value)


def share_attributes(model, other, is_shared) -> None:
    """Gives one model what another one has.

    Args:
        model: The one that has it.
        other: One whose constructor has not run.
        is_shared: Tells by the name of an attribute whether it is given.
    """
    # Methods that `__new__` has put around those of the class.
    wrapped = {"build", "quantize"}
    attributes = {
        name: value
        for name, value in vars(model).items()
        if name not in wrapped and is_shared(name)
    }
    for name in (
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_dependency_names",
        "_self_unconditional_deferred_dependencies",
    ):
        # What `tf.train.Checkpoint` finds: another optimizer for the one is
        # none for the other.
        if name in attributes:
            attributes[name] = copy.copy(attributes[name])
    # Past `__setattr__`, which would track them once more.
    vars(other).update(attributes)


class ToldOfClones:
    """In front of a functional model's class: tells a clone of its original.

    `keras.models.clone_model` calls the clone's layers, one after the other, by
    this method, and makes a model of what they return. Layers that were called
    have left a history in it. When a model is called, there is none.
    """

    def _run_through_graph(self, *args, **kwargs):
        outputs = super()._run_through_graph(*args, **kwargs)
        for output in keras.tree.flatten(outputs):
            if hasattr(output, "_keras_history"):
                output._original = weakref.ref(self)
        return outputs


def take_original(tensors):
    """The model that a clone is made of, given its outputs; or None.

    It is told once: other models may be made of the same outputs.
    """
    original = None
    for tensor in keras.tree.flatten(tensors):
        if hasattr(tensor, "_original"):
            original = tensor._original()
            del tensor._original
    return original


def keeps_automatic_config(get_config):
    """Marks an override of `get_config` that only adds to Keras's.

    Keras writes the configuration of a subclass from the arguments of its
    constructor, unless the subclass has a `get_config` without this mark.
    """
    return python_utils.default(get_config)
