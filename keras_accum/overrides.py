"""Which of a model's methods are a user's own."""

import inspect
from collections.abc import Callable

import keras

from keras_accum import compat


class Overrides:
    """What a user's classes override, in front of the mixin and behind it.

    Args:
        model: The model.
        mixin: The class that is ours.
    """

    def __init__(self, model: keras.Model, mixin: type) -> None:
        self._model, self._mixin = model, mixin

    def has(self, name: str) -> bool:
        """Returns whether a method of ours, which Keras has not, is replaced.

        Args:
            name: "microbatch_weight" or "update_step".
        """
        return getattr(type(self._model), name) is not getattr(
            self._mixin, name
        )

    def is_behind(self, name: str) -> bool:
        """Returns whether a class behind the mixin has a step of its own.

        Args:
            name: "train_step" or "test_step".
        """
        return compat.has_custom_step(self._model, self._mixin, name)

    def step(self, name: str) -> Callable | None:
        """Returns a user's own step, or None if there is none.

        Args:
            name: "train_step" or "test_step".
        """
        if self.has(name):
            return getattr(type(self._model), name)
        if self.is_behind(name):
            return getattr(super(self._mixin, self._model), name).__func__
        return None

    def replaces(self, name: str) -> bool:
        """Returns whether a user's own step does not call the one behind it.

        Args:
            name: "train_step" or "test_step".
        """
        step = self.step(name)
        if step is None:
            return False
        code = getattr(inspect.unwrap(step), "__code__", None)
        # What calls `super()` has its class at hand.
        return code is None or "__class__" not in code.co_freevars
