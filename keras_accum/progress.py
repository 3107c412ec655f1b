"""Where `fit` is, so that a run that was killed goes on inside an epoch.

Keras's `BackupAndRestore` goes on at the start of the epoch that it was in,
with the weights from the middle of it. Here the number of batches is saved with
the weights. Whatever loads them when training begins, and before the first
epoch does, has those batches skipped.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Progress:
    """The epoch, and its batches so far.

    Attributes:
        epoch: Index of the epoch.
        batches: Batches of it that the weights have seen; 0 outside of `fit`.
        to_skip: Batches of it that are still to be skipped.
    """

    epoch: int = 0
    batches: int = 0
    to_skip: int = 0
    _loaded: tuple[int, int] | None = None

    def begin_training(self) -> None:
        """Starts to listen for what is loaded."""
        self.end_training()
        self._loaded = None

    def load(self, epoch: int, batches: int) -> None:
        """Notes where the weights come from."""
        self._loaded = epoch, batches

    def first_epoch(self, epoch: int | None) -> int | None:
        """The epoch to begin with, where `BackupAndRestore` says `epoch`.

        That counts epochs anew in each process, and so goes back to the first
        one if it is killed twice.
        """
        return epoch if self._loaded is None else self._loaded[0]

    def begin_epoch(self, epoch: int) -> None:
        """Starts an epoch: the one that the weights come from, or another."""
        loaded_epoch, batches = self._loaded or (epoch, 0)
        self._loaded = None
        self.epoch = epoch
        self.batches = self.to_skip = batches if loaded_epoch == epoch else 0

    def end_epoch(self) -> None:
        """Ends an epoch: the next one has seen no batches."""
        self.epoch, self.batches, self.to_skip = self.epoch + 1, 0, 0

    def end_training(self) -> None:
        """Ends `fit`."""
        self.batches = self.to_skip = 0


def counting_batches(model, function: Callable) -> Callable:
    """Wraps a train function: counts its batches, or skips them.

    Callbacks see the steps that are skipped, as they did the first time, but
    without logs.
    """
    progress = model._accum_progress

    def wrapped(iterator):
        number = model.steps_per_execution
        if not progress.to_skip:
            logs = function(iterator)
            progress.batches += number
            return logs
        for _ in range(min(number, progress.to_skip)):
            data = next(iterator)
        # If nothing is left of the epoch, its end asks for metrics.
        model._build_for(data)
        progress.to_skip = max(0, progress.to_skip - number)
        return {}

    return wrapped
