"""A model of another class that shares every attribute of an existing one.

Layers, variables and graph of a model cannot be moved into an object of another
class, nor made again with what a user has done to them. But an object is a
class and a dict of attributes: this one has another class, and the attributes
are the very same objects.
"""

import keras

from keras_accum import compat

# What belongs to the windows of the first model, if it has any.
PREFIX = "_accum"


def sharing_all(model: keras.Model, cls: type[keras.Model]) -> keras.Model:
    """Makes a model of another class that shares all of a model.

    Args:
        model: Any model.
        cls: The class of that model, or one that is derived from it.
    """
    made = keras.Model.__new__(cls)
    # Past `__setattr__`, which would track them once more.
    vars(made).update(
        {
            name: value
            for name, value in compat.attributes_to_share(model).items()
            if not name.startswith(PREFIX)
        }
    )
    for name in ("train_function", "test_function", "predict_function"):
        # Traced with the methods of the other class.
        object.__setattr__(made, name, None)
    return made


def seen_as(model: keras.Model, cls: type[keras.Model]) -> keras.Model:
    """Returns a model as one of its base classes, only to be looked at.

    Args:
        model: A model that `sharing_all` returned.
        cls: A class that it is derived from.
    """
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", model.__dict__)
    return view
