"""What is known of a model's losses, since it was measured."""

import dataclasses

import keras

from keras_accum import compat
from keras_accum.coupling import Kind


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a model's losses; None or nothing where it is not.

    Attributes:
        compiled: The kind of each loss given to `compile`.
        undivided: Whether each of them is a mean that Keras does not divide by
            the number of replicas, as it does with others.
        compute_loss: The kind of an override of `compute_loss`.
        adds_losses: Whether `compute_loss` adds `model.losses`.
    """

    compiled: tuple[Kind | None, ...] = ()
    undivided: tuple[bool, ...] = ()
    compute_loss: Kind | None = None
    adds_losses: bool = True

    @property
    def couples_rows(self) -> bool:
        """Whether any loss couples rows."""
        return Kind.COUPLED in (*self.compiled, self.compute_loss)

    def coupled_names(self, model: keras.Model) -> list[str]:
        """Returns the names of the losses that couple rows."""
        if self.compute_loss is Kind.COUPLED:
            return ["compute_loss"]
        names = compat.loss_names(compat.compiled_loss(model))
        return [
            name
            for name, kind in zip(names, self.compiled, strict=True)
            if kind is Kind.COUPLED
        ]
