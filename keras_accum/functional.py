"""Model classes that combine ours with another, made on demand.

`keras.Model.__init__`, called with inputs and outputs, puts the functional
subclass in place of `keras.Model` among the bases of the class that is being
constructed, and it stays there: subclasses that have a `call` of their own then
break. Here a functional model gets a class of its own, and no class changes. So
does a model that was made as one of a user's class.
"""

import types

import keras

from keras_accum import compat
from keras_accum import sharing
from keras_accum.options import Options
from keras_accum.warned import did_you_mean


def is_functional_call(args, kwargs) -> bool:
    """Returns whether a model's constructor is given inputs and outputs.

    Keras goes by their number and names, which other models' arguments may have
    too: here they must be symbolic.
    """
    given = dict(zip(("inputs", "outputs"), args, strict=False)) | kwargs
    if len(args) > 2 or not {"inputs", "outputs"} <= given.keys():
        return False
    leaves = keras.tree.flatten([given["inputs"], given["outputs"]])
    return any(isinstance(leaf, keras.KerasTensor) for leaf in leaves)


def check_functional_call(kwargs) -> None:
    """Raises a `TypeError` for what a functional model would ignore."""
    accepted = {"inputs", "outputs", "name", "trainable", *Options.names()}
    unknown = kwargs.keys() - accepted
    if unknown:
        received = ", ".join(f"{name}={kwargs[name]!r}" for name in unknown)
        raise TypeError(
            "A functional model takes `inputs`, `outputs`, `name`, "
            "`trainable`, and the arguments of `GradientAccumulationModel`. "
            f"Received: {received}."
            f"{did_you_mean(unknown, Options.names())}"
        )


def check_positional(args) -> None:
    """Raises a `TypeError` for what other classes take by position."""
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        raise TypeError(
            "A list of layers makes a `keras.Sequential`. Write "
            "`GradientAccumulationModel.from_model(keras.Sequential(layers), "
            f"accum_steps=8)`. Received: a list of {len(args[0])}"
        )
    if len(args) > 2:
        raise TypeError(
            "What comes after inputs and outputs is given by name, as in "
            "`GradientAccumulationModel(inputs, outputs, accum_steps=8)`. "
            f"Received: {args[2]!r}"
        )


def functional_subclass(cls: type[keras.Model]) -> type[keras.Model]:
    """Returns the class of functional models of `cls`.

    Args:
        cls: A subclass of `keras.Model`.
    """
    return subclass_of_both(cls, compat.functional_class())


def class_of_clone(cls: type[keras.Model]) -> type[keras.Model]:
    """Returns the class of models of inputs and outputs, for one of `cls`.

    `keras.models.clone_model` makes of a class that has another constructor
    what it is built of.

    Args:
        cls: A class that may have been made by `subclass_of_both`.
    """
    other = other_class(cls)
    if other is not None and not compat.takes_inputs_and_outputs(other):
        cls = named_class(cls)
    return functional_subclass(cls)


def subclass_of_both(
    cls: type[keras.Model], other: type[keras.Model]
) -> type[keras.Model]:
    """Returns the class of models that are of both classes, made once.

    It has the name of `cls`, and is saved and loaded as `cls`, unless one of
    the two is of both already.

    Args:
        cls: A subclass of `keras.Model`.
        other: Another class; `cls` wins where both define something.
    """
    if issubclass(cls, other):
        return cls
    if issubclass(other, cls):
        return other
    # Not inherited: a subclass of `cls` needs some of its own.
    if "_subclasses_of_both" not in cls.__dict__:
        cls._subclasses_of_both = {}
    made = cls._subclasses_of_both
    if other not in made:
        namespace = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_stands_for": cls,
        }
        if hasattr(other, "save_to_preset"):
            namespace |= {
                "save_to_preset": save_to_preset,
                "from_preset": classmethod(from_preset),
            }
        made[other] = types.new_class(
            cls.__name__,
            (cls, other),
            exec_body=lambda ns: ns.update(namespace),
        )
        register_as(made[other], cls)
    return made[other]


def named_class(cls: type[keras.Model]) -> type[keras.Model]:
    """Returns the class that `subclass_of_both` made `cls` of, or `cls`."""
    return cls.__dict__.get("_stands_for", cls)


def other_class(cls: type[keras.Model]) -> type[keras.Model] | None:
    """Returns the other class that `cls` was made of, unless it is Keras's own.

    Models of Keras's functional class are made by inputs and outputs, and of
    these nothing else has to be known.
    """
    if "_stands_for" not in cls.__dict__:
        return None
    _, other = cls.__bases__
    return None if other is compat.functional_class() else other


def save_to_preset(self: keras.Model, *args, **kwargs) -> None:
    """Saves a preset of KerasHub, as the class that it has without ours."""
    view = sharing.seen_as(self, other_class(type(self)))
    view.save_to_preset(*args, **kwargs)


def from_preset(cls: type[keras.Model], *args, **kwargs) -> keras.Model:
    """Loads a preset of KerasHub; takes our arguments as well, by name."""
    options = {
        name: kwargs.pop(name) for name in Options.names() if name in kwargs
    }
    model = other_class(cls).from_preset(*args, **kwargs)
    return named_class(cls).from_model(model, **options)


def register_as(subclass, cls):
    """Saves models of `subclass` under the name that `cls` is registered as."""
    package, separator, name = keras.saving.get_registered_name(cls).partition(
        ">"
    )
    if separator:
        register = keras.saving.register_keras_serializable(package, name)
        register(subclass)
        # The later registration is the one that loading finds.
        register(cls)
