"""The classes of models, and what is saved of them."""

import copy
from collections.abc import Callable
from typing import TypeVar

import keras
from keras.src.models.functional import Functional
from keras.src.models.functional import functional_like_constructor
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import python_utils

F = TypeVar("F", bound=Callable)


def functional_class() -> type[keras.Model]:
    """Returns the class of models that are built from inputs and outputs.

    `keras.Model(inputs, outputs)` returns one; it has no public name.
    """
    return Functional


def takes_inputs_and_outputs(cls) -> bool:
    """Returns whether a class is constructed as a functional model is."""
    return functional_like_constructor(cls)


class Saveable(KerasSaveable):
    """An object with a place of its own in the files of its model."""

    def _obj_type(self):
        return "Loss"  # A type that has no children.


class CheckpointMixin:
    """A model that has objects of its own in TensorFlow's checkpoints.

    It has the methods `_children_to_save`, which returns them by name, and
    `_child_to_restore`, which returns the one of a name, or None if it is not
    ours. Exported models have none of them.
    """

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint":
            children = children | self._children_to_save()
        return children

    def _lookup_dependency(self, name, *args, **kwargs):
        child = self._child_to_restore(name)
        if child is not None:
            return child
        return super()._lookup_dependency(name, *args, **kwargs)


def set_untracked(owner, name, value) -> None:
    """Sets an attribute that Keras and TensorFlow do not look at."""
    object.__setattr__(owner, name, value)


def attributes_to_share(model) -> dict:
    """Returns what an object of another class may share with a model."""
    # Methods that `__new__` has put around those of the class.
    wrapped = {"build", "quantize"}
    attributes = {
        name: value
        for name, value in vars(model).items()
        if name not in wrapped
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
    return attributes


class ToldOfClones:
    """In front of a functional model's class: sees what its clones return.

    `keras.models.clone_model` calls the clone's layers, one after the other, by
    a method of the original, and makes a model of what they return. Layers that
    were called have left a history in it. When a model is called, there is
    none. `_record_clone` is called with the outputs that have one.
    """

    def _run_through_graph(self, *args, **kwargs):
        outputs = super()._run_through_graph(*args, **kwargs)
        self._record_clone(
            [
                output
                for output in keras.tree.flatten(outputs)
                if hasattr(output, "_keras_history")
            ]
        )
        return outputs


def keeps_automatic_config(get_config: F) -> F:
    """Marks an override of `get_config` that only adds to Keras's.

    Keras writes the configuration of a subclass from the arguments of its
    constructor, unless the subclass has a `get_config` without this mark.
    """
    return python_utils.default(get_config)
