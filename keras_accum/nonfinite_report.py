"""Who made a gradient not finite, as `model.nonfinite_report` tells."""

import dataclasses

# Most rows that a line of the log names.
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class NonfiniteReport:
    """Where gradients with a NaN or an infinity came from.

    It is found by computing the batch again after its step, eagerly and with
    draws of its own, and is as good as that.

    Attributes:
        epoch: The epoch, as Keras counts, from 0; None outside of `fit`.
        batch: The batch in the epoch, from 0; outside of `fit`, the number of
            calls of `train_on_batch` before. The first and the last one it may
            be, where it cannot be told; None if nothing is known of it.
        rows: Rows of the batch, from 0, with values that are not finite. With
            several replicas, those of this worker's first one come first, then
            those of the next. Empty if they cannot be told.
        layer: The path of the layer in which it began, or of the variable if
            `stage` is "weights". None if it was in no layer.
        stage: "input" if the batch is not finite, "weights" if a variable is
            not, "forward" or "backward" for the pass in which it began,
            "loss" for the loss or its gradient, or "unknown".
        note: What else there is to say: a few words.
    """

    epoch: int | None
    batch: int | tuple[int, int] | None
    rows: tuple[int, ...] = ()
    layer: str | None = None
    stage: str = "unknown"
    note: str = ""

    def __str__(self) -> str:
        """Returns it as one sentence."""
        return f"Gradients were not finite: {self.told()}"

    def told(self) -> str:
        """Returns what comes after the first words of the sentence."""
        where = [] if self.epoch is None else [f"epoch {self.epoch}"]
        if isinstance(self.batch, tuple):
            where.append(f"one of batches {self.batch[0]} to {self.batch[1]}")
        elif self.batch is not None:
            where.append(f"batch {self.batch}")
        if self.rows:
            rows = ", ".join(map(str, self.rows[:SHOWN]))
            more = len(self.rows) - SHOWN
            others = f" and {more} more" if more > 0 else ""
            where.append(f"row{'s' * (len(self.rows) > 1)} {rows}{others}")
        text = f"{', '.join(where) or 'outside of `fit`'}; {self._cause()}"
        return f"{text}: {self.note}." if self.note else f"{text}."

    def _cause(self):
        return {
            "input": "the batch itself is not finite",
            "weights": f"the variable `{self.layer}` is not finite",
            "forward": f"it began in the outputs of `{self.layer}`",
            "backward": f"it began in the gradient through `{self.layer}`",
            "loss": "it began in the loss or its gradient",
            "unknown": "it cannot be told where it began",
        }[self.stage]
