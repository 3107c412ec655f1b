"""A second call: variables in it hold what they held before the first one.

And the error where it would not be as the first one was.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Self

import keras
import tensorflow as tf

from keras_accum import compat


class NotRepeatable(ValueError):
    """A second call of a function would not be as the first one was.

    Args:
        message: What is said.
        names: As the attribute.

    Attributes:
        names: Of the layers that the function calls. An error that Keras makes
            of this one, to say with what they were called, has none.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = names

    def first(self) -> Self:
        """Returns the error that has the names."""
        error: BaseException = self
        while not getattr(error, "names", ()) and error.__context__:
            error = error.__context__
        return error if isinstance(error, type(self)) else self


class Variables(keras.StatelessScope):
    """Has variables hold other values, and be assigned for this call alone.

    As in the first call, no gradient goes through an assignment, and what is
    read from a variable has the gradient of that variable.

    Args:
        values: Pairs of a variable and what it held.
        outer: What variables hold by the scope around the first call, by `id`.
        tape: What records the call.
    """

    def __init__(
        self,
        values: Iterable[tuple[keras.Variable, tf.Tensor]],
        outer: dict[int, tf.Tensor],
        tape: tf.GradientTape,
    ) -> None:
        super().__init__(initialize_variables=False)
        self.state_mapping |= outer
        self._tape = tape
        self._held: list[tuple[keras.Variable, tf.Tensor]] = []
        for each in values:
            self.add_update(each)

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Assigns a value."""
        variable, value = update
        value = tf.stop_gradient(tf.cast(value, variable.dtype))
        if value.dtype.is_floating:
            self._tape.watch(value)
            self._held.append((variable, value))
        super().add_update((variable, value))

    def gradients(
        self,
        outputs: Sequence[tf.Tensor],
        sources: Sequence[tf.Tensor],
        variables: Sequence[tf.Variable],
        upstream: Sequence[tf.Tensor],
    ) -> list:
        """Returns gradients by tensors and variables; None where there is none.

        Args:
            outputs: What they are of.
            sources: The tensors.
            variables: The variables.
            upstream: The gradients of the outputs.
        """
        held = [value for _, value in self._held]
        by_all = self._tape.gradient(
            outputs, [*sources, *variables, *held], list(upstream)
        )
        count = len(sources) + len(variables)
        gradients, by_held = by_all[:count], by_all[count:]
        places = {
            id(variable): place
            for place, variable in enumerate(variables, len(sources))
        }
        for (variable, _), gradient in zip(self._held, by_held, strict=True):
            place = places.get(id(compat.tensorflow_variable(variable)))
            if place is None or gradient is None:
                continue
            if gradients[place] is not None:
                gradient += tf.convert_to_tensor(gradients[place])
            gradients[place] = gradient
        return gradients
