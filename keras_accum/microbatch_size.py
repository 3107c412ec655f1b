"""How many rows make a micro-batch: what is given, or what was found to fit."""

import keras
from absl import logging

from keras_accum import compat
from keras_accum.options import AUTO


class MicrobatchSize:
    """Most rows of a micro-batch: given, or found by trying.

    Args:
        value: A positive int; "auto" to find it; None for all rows of a batch.

    Attributes:
        value: As above; once a size was found, that.
        is_auto: Whether it is to be found, or was.
        limit: Then, the size that the last failure left, or None.
    """

    def __init__(self, value: int | str | None) -> None:
        self.value = value
        self.is_auto = value == AUTO
        self.limit: int | None = None

    @property
    def rows(self) -> int | None:
        """Rows to take at once; None for all, also if it is yet to be found."""
        return None if self.value == AUTO else self.value

    def to_try(self, rows: int) -> int:
        """Returns how many rows to take at once, of a batch of `rows` rows."""
        return min(rows, self.limit or rows)

    def record_fit(self, size: int) -> bool:
        """Records that a size fits; returns whether that changes the value."""
        # A short batch says nothing of longer ones.
        before = self.rows or 0
        found = max(size, before) if self.limit is None else self.limit
        if found == self.value:
            return False
        self.value = found
        if before == 0 or self.limit is not None:
            logging.warning(
                'microbatch_size="auto": found that %d rows at once fit on '
                "each device.",
                found,
            )
        return True


def check_layers(model: keras.Model) -> None:
    """Raises a `ValueError` if rows of a batch would be taken as its past."""
    stateful = compat.stateful_layers(model)
    if stateful:
        raise ValueError(
            "`microbatch_size` does not work with recurrent layers that are "
            "`stateful`: each goes on, row by row, from the state that the "
            "batch before has left, and the rows of one batch do not follow "
            "each other in time. Use `accum_steps`, with batches as they "
            f"follow each other. Received: stateful layer {stateful[0].name!r}"
        )
