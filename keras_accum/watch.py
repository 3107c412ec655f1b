"""Watches for gradients that are not finite, and holds batches to say who.

As ordinary code, with a `nonfinite` policy:

```python
for index, batch in enumerate(batches):
    logs = step(batch)
    if skipped > skipped_before:
        report = find_cause(batch)
```

A step returns its batch and the count beside the logs, which copies nothing.
Where a GPU counts, reading the count would wait for the device. A thread waits
there, and the host goes on; meanwhile the batches are held.
"""

import collections
import concurrent.futures
import dataclasses
import math
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from keras_accum import replay
from keras_accum.nonfinite_report import NonfiniteReport

# Most bytes of batches that are held, besides the newest one.
LIMIT = 64 * 2**20


class Trained(NamedTuple):
    """What a step returns that is watched.

    Attributes:
        logs: Its logs.
        data: Its batch; () if an execution has several steps.
        counts: What the replicas of this worker left out so far.
    """

    logs: dict
    data: object
    counts: tuple[tf.Tensor, ...]


@dataclasses.dataclass(eq=False)
class Held:
    """A batch that was trained on.

    Attributes:
        batch: Its index in the epoch, or the first and the last it may be.
        data: As it was given to the step, or None.
        counts: As `Trained` has them; None once they were read.
        num_bytes: How much memory the batch has, once that was measured.
    """

    batch: int | tuple[int, int]
    data: object
    counts: tuple[tf.Tensor, ...] | None
    num_bytes: int = 0

    @property
    def has_data(self) -> bool:
        """Whether the batch is there."""
        return self.data is not None

    def measure(self) -> int:
        """Returns how much memory the batch has, and notes it."""
        self.num_bytes = sum(
            leaf.dtype.size * math.prod(leaf.shape)
            for leaf in tf.nest.flatten(self.data, expand_composites=True)
            if isinstance(leaf, tf.Tensor)
        )
        return self.num_bytes


class Watch:
    """Watches a training for gradients that are not finite.

    Args:
        accumulation: What the model accumulates in.
    """

    def __init__(self, accumulation) -> None:
        self._accumulation = accumulation
        self._report: NonfiniteReport | None = None
        self._reader: concurrent.futures.Executor | None = None
        # Of `train_on_batch`.
        self._num_batches = 0
        self.begin_epoch()

    def begin_training(self) -> None:
        """Forgets what was found: `fit` begins."""
        self._report = None

    def begin_epoch(self) -> None:
        """Looks for the first in an epoch, whose count is zero."""
        self._before, self._is_over = 0.0, False
        self._let_go()

    def end_training(self) -> None:
        """Looks for the first outside of `fit`."""
        self._before, self._is_over = total(self._counts()), False
        self._num_batches = 0
        self._let_go()

    @property
    def report(self) -> NonfiniteReport | None:
        """What was found last."""
        self.look_at_rest()
        return self._report

    def returned(self, logs, data):
        """Returns what a step that made `logs` of `data` is to return."""
        model = self._accumulation.model
        if self._accumulation.options.nonfinite == "propagate":
            return logs
        if model.steps_per_execution > 1:
            # They are one after the other in a loop, which takes no None.
            data = ()
        return Trained(logs, data, self._counts())

    def look(self, returned):
        """Looks at what `returned` gave to a step; returns its logs."""
        if not isinstance(returned, Trained):
            return returned
        progress = self._accumulation.progress
        batch = progress.batches if progress.is_in_fit else self._num_batches
        num_steps = self._accumulation.model.steps_per_execution
        self._num_batches += num_steps
        if self._is_over:
            return returned.logs
        data = returned.data
        if num_steps > 1:
            batch, data = (batch, batch + num_steps - 1), None
        held = Held(batch, data, returned.counts)
        self._held.append(held)
        if are_at_hand(held.counts):
            self._read([held])
        else:
            self._read_later()
        self._drop()
        return returned.logs

    def look_at_rest(self) -> None:
        """Waits for all steps, and looks at what they and an update left."""
        self._read(list(self._held))
        if not self._is_over and total(self._counts()) > self._before:
            self._report_on(list(self._held))

    def _counts(self):
        return self._accumulation.window["nonfinite"].local_counts()

    def _let_go(self):
        self._held: collections.deque[Held] = collections.deque()
        self._bytes = 0
        self._awaited: Held | None = None
        self._reading: concurrent.futures.Future | None = None

    def _read(self, some: list[Held]):
        """Reads counts, which waits for their steps."""
        for held in some:
            if self._is_over or held.counts is None:
                continue
            counts, held.counts = held.counts, None
            if total(counts) > self._before:
                held_so_far = list(self._held)
                self._report_on(held_so_far[: held_so_far.index(held) + 1])

    def _read_later(self):
        """Has a thread wait for the newest step, if it waits for no other."""
        if self._reading is not None:
            if not self._reading.done():
                return
            done = list(self._held)
            done = done[: done.index(self._awaited) + 1]
            if self._reading.result() > self._before:
                self._read(done)
                return
            for held in done:
                held.counts = None
        self._reader = self._reader or concurrent.futures.ThreadPoolExecutor(1)
        self._awaited = self._held[-1]
        self._reading = self._reader.submit(total, self._awaited.counts)

    def _drop(self):
        """Lets go of batches that are of no use any more, or too large."""
        most = self._most_of_window()
        held = self._held
        while held and most is not None and held[0].counts is None:
            if len(held) <= most:
                break
            self._bytes -= held.popleft().num_bytes
        if not held:
            return
        self._bytes += held[-1].measure()
        for each in held:
            if self._bytes <= LIMIT or each is held[-1]:
                break
            self._bytes -= each.num_bytes
            each.data, each.num_bytes = None, 0

    def _most_of_window(self):
        """Returns how many batches a window has that are of use, if known.

        Where each micro-batch is looked at, and where a step ends a window, the
        count that it leaves tells all.
        """
        accumulation = self._accumulation
        if (
            accumulation.options.nonfinite == "skip_microbatch"
            or accumulation.size.value is not None
        ):
            return 0
        size = accumulation.position.accum_steps
        return size if isinstance(size, int) else None

    def _report_on(self, candidates: list[Held]):
        """Replays batches, and tells of the first that is not finite."""
        self._is_over = True
        progress = self._accumulation.progress
        epoch = progress.epoch if progress.is_in_fit else None
        if self._accumulation.options.nonfinite == "skip_microbatch":
            candidates = candidates[-1:]
        self._report = report = report_on(self._accumulation, candidates, epoch)
        self._let_go()
        logging.warning("Gradients were not finite: %s", report.told())


def report_on(
    accumulation, candidates: list[Held], epoch: int | None
) -> NonfiniteReport:
    """Replays batches, and returns the report on the first that is not finite.

    Args:
        accumulation: What the model accumulates in.
        candidates: The batches, in the order of training.
        epoch: Their epoch.
    """
    if not candidates:
        return NonfiniteReport(epoch, None, note="it was in no batch of `fit`")
    note = "computed again, all is finite"
    for held in candidates:
        if not held.has_data:
            note = "its batches were not held"
            continue
        try:
            cause = replay.find_cause(
                accumulation, held.data, accumulation.size.value
            )
        except Exception as error:  # noqa: BLE001
            # Training goes on, whatever a model makes of being called so.
            said = str(error).partition("\n")[0].rstrip(".")
            note = f"it could not be computed again, {said}"
            continue
        if cause is not None:
            return NonfiniteReport(
                epoch,
                held.batch,
                cause.rows,
                cause.layer,
                cause.stage,
                cause.note,
            )
    first, last = candidates[0].batch, candidates[-1].batch
    if len(candidates) > 1:
        first = first if isinstance(first, int) else first[0]
        last = last if isinstance(last, int) else last[1]
        last = first, last
    return NonfiniteReport(epoch, last, note=note)


def are_at_hand(counts: tuple[tf.Tensor, ...]) -> bool:
    """Returns whether reading counts waits for no device."""
    return all("CPU" in each.device for each in counts)


def total(counts: tuple[tf.Tensor, ...]) -> float:
    """Returns the sum of the replicas' counts."""
    return sum(float(each) for each in counts)
