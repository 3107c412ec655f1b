"""What is known of a model's losses and state, since it was measured."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import keras

from keras_accum import compat
from keras_accum.coupling import Kind

_KINDS = (None, *Kind)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a model's losses; None or nothing where it is not.

    Attributes:
        compiled: The kind of each loss given to `compile`.
        undivided: Whether each of them is a mean that Keras does not divide by
            the number of replicas, as it does with others.
        compute_loss: The kind of an override of `compute_loss`.
        adds_losses: Whether `compute_loss` adds `model.losses`.
        is_apart: Whether it can be computed apart from the model's call.
        added: The kind of each loss that layers add, in the order of
            `model.losses`.
        added_by: The names of the layers that add them.
        repeated: Which of `model.variables` are assigned what follows from the
            weights alone: the same in each micro-batch.
        driven: Which of them are assigned what follows from the data, other
            than a BatchNormalization's.
        mixes_rows: Whether outputs of a row depend on the rows with it.
        is_cut: Whether rows could be taken out of the inputs, to look at.
    """

    compiled: tuple[Kind | None, ...] = ()
    undivided: tuple[bool, ...] = ()
    compute_loss: Kind | None = None
    adds_losses: bool = True
    is_apart: bool = True
    added: tuple[Kind | None, ...] = ()
    added_by: tuple[str, ...] = ()
    repeated: tuple[int, ...] = ()
    driven: tuple[int, ...] = ()
    mixes_rows: bool = False
    is_cut: bool = True

    def codes(self) -> list[int]:
        """Returns all but names as integers, for `from_codes`."""
        lists = [
            list(map(_KINDS.index, self.compiled)),
            list(map(int, self.undivided)),
            [
                _KINDS.index(self.compute_loss),
                int(self.adds_losses),
                int(self.is_apart),
                int(self.mixes_rows),
                int(self.is_cut),
            ],
            list(map(_KINDS.index, self.added)),
            list(self.repeated),
            list(self.driven),
        ]
        return [code for each in lists for code in (len(each), *each)]

    @classmethod
    def from_codes(cls, codes: Sequence[int]) -> Self:
        """Returns what has these `codes`."""
        rest, lists = iter(codes), []
        for length in rest:
            lists.append([next(rest) for _ in range(length)])
        compiled, undivided, total, added, repeated, driven = lists
        return cls(
            compiled=tuple(_KINDS[code] for code in compiled),
            undivided=tuple(map(bool, undivided)),
            compute_loss=_KINDS[total[0]],
            adds_losses=bool(total[1]),
            is_apart=bool(total[2]),
            mixes_rows=bool(total[3]),
            is_cut=bool(total[4]),
            added=tuple(_KINDS[code] for code in added),
            repeated=tuple(repeated),
            driven=tuple(driven),
        )

    @property
    def couples_rows(self) -> bool:
        """Whether any loss couples rows."""
        return Kind.COUPLED in (*self.compiled, self.compute_loss)

    def coupled_names(self, model: keras.Model) -> list[str]:
        """Returns the names of the losses that couple rows."""
        if self.compute_loss is Kind.COUPLED:
            return ["compute_loss"]
        if Kind.COUPLED not in self.compiled:
            return []
        names = compat.loss_names(compat.compiled_loss(model))
        return [
            name
            for name, kind in zip(names, self.compiled, strict=True)
            if kind is Kind.COUPLED
        ]

    def coupled_layers(self) -> list[str]:
        """Returns the names of layers that add a loss that couples rows."""
        return [
            name
            for name, kind in zip(self.added_by, self.added, strict=False)
            if kind is Kind.COUPLED
        ]

    def driven_paths(self, model: keras.Model) -> list[str]:
        """Returns the paths of variables that are assigned what data give."""
        return [model.variables[index].path for index in self.driven]
