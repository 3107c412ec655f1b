"""One class whose models may be functional or subclassed, in any order.

`keras.Model.__init__`, called with inputs and outputs, puts the functional
subclass in place of `keras.Model` among the bases of the class that is being
constructed, and that for good: subclasses that have a `call` of their own then
break. Here a functional model gets a class of its own, and no class changes.
"""

import keras

from keras_accum import compat


def is_functional_call(args, kwargs) -> bool:
    """Whether a model's constructor is given inputs and outputs.

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
    unknown = kwargs.keys() - {"inputs", "outputs", "name", "trainable"}
    if unknown:
        received = ", ".join(f"{name}={kwargs[name]!r}" for name in unknown)
        raise TypeError(
            "A functional model takes `inputs`, `outputs`, `name`, "
            "`trainable`, and the arguments of `GradientAccumulationModel`. "
            f"Received: {received}"
        )


def functional_subclass(cls: type[keras.Model]) -> type[keras.Model]:
    """The class of functional models of `cls`, made once.

    It has the name of `cls`, and is saved and loaded as `cls`.

    Args:
        cls: A subclass of `keras.Model`.
    """
    functional = compat.functional_class()
    if issubclass(cls, functional):
        return cls
    # Not inherited: a subclass of `cls` needs one of its own.
    if "_functional_subclass" not in cls.__dict__:
        namespace = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        subclass = type(cls)(cls.__name__, (cls, functional), namespace)
        register_as(subclass, cls)
        cls._functional_subclass = subclass
    return cls._functional_subclass


def named_class(cls: type[keras.Model]) -> type[keras.Model]:
    """The class that `functional_subclass` made `cls` of, or `cls` itself."""
    (base, *_) = cls.__bases__
    if base.__dict__.get("_functional_subclass") is cls:
        return base
    return cls


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
