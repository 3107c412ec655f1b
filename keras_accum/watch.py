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


class Held(NamedTuple):
    """A batch that was trained on.

    Attributes:
        batch: Its index in the epoch, or the first and the last it may be.
        data: As it was given to the step, or None.
        counts: As `Trained` has them.
    """

    batch: int | tuple[int, int]
    data: object
    counts: tuple[tf.Tensor, ...]


class Watch:
    """Watches a training for gradients that are not finite.

    What it does in each step is kept small: it is Python, between two steps.

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
        logs, data, counts = returned
        progress = self._accumulation.progress
        batch = progress.batches if progress.is_in_fit else self._num_batches
        num_steps = self._accumulation.model.steps_per_execution
        self._num_batches += num_steps
        if self._is_over:
            return logs
        if num_steps > 1:
            batch, data = (batch, batch + num_steps - 1), None
        if self._held is None:
            self._begin(data, counts)
        held = Held(batch, data, counts)
        if not self._is_at_hand:
            self._held.append(held)
            self._read_later()
        elif total(counts) > self._before:
            self._report_on([*self._held, held])
        elif self._keeps:
            self._held.append(held)
        return logs

    def look_at_rest(self) -> None:
        """Waits for all steps, and looks at what they and an update left."""
        self._read()
        if not self._is_over and total(self._counts()) > self._before:
            self._report_on(list(self._held or ()) if self._keeps else [])

    def _counts(self):
        return self._accumulation.window["nonfinite"].local_counts()

    def _let_go(self):
        self._held: collections.deque[Held] | None = None
        self._keeps, self._is_at_hand = False, True
        self._awaited: Held | None = None
        self._reading: concurrent.futures.Future | None = None

    def _begin(self, data, counts):
        """Begins to hold batches, by what the first one is.

        Those after it are taken to be as large.
        """
        accumulation = self._accumulation
        self._is_at_hand = are_at_hand(counts)
        # Else each step's count tells all of it.
        self._keeps = (
            accumulation.options.nonfinite == "skip_window"
            and accumulation.size.value is None
        )
        most = max(1, LIMIT // max(1, num_bytes(data)))
        size = accumulation.position.accum_steps
        if self._is_at_hand and isinstance(size, int):
            # The count is read before the update that ends a window.
            most = min(most, size)
        self._held = collections.deque(maxlen=most)

    def _read(self):
        """Reads the counts, which waits for the steps; reports the first."""
        held = list(self._held or ())
        for index, each in enumerate(held):
            if total(each.counts) > self._before:
                self._report_on(held[: index + 1])
                return

    def _read_later(self):
        """Has a thread wait for the newest step, if it waits for no other."""
        if self._reading is not None:
            if not self._reading.done():
                return
            if self._reading.result() > self._before:
                self._read()
                return
            while not self._keeps and self._held:
                if self._held.popleft() is self._awaited:
                    break
        if not self._held:
            self._reading = None
            return
        self._reader = self._reader or concurrent.futures.ThreadPoolExecutor(1)
        self._awaited = self._held[-1]
        self._reading = self._reader.submit(total, self._awaited.counts)

    def _has_all(self, candidates):
        """Returns whether no batch that may be the one was let go of."""
        if not self._keeps or len(candidates) < self._held.maxlen:
            return True
        return self._held.maxlen == self._accumulation.position.accum_steps

    def _report_on(self, candidates: list[Held]):
        """Replays batches, and tells of the first that is not finite."""
        self._is_over = True
        progress = self._accumulation.progress
        epoch = progress.epoch if progress.is_in_fit else None
        if not self._keeps:
            candidates = candidates[-1:]
        self._report = report = replay.report_on(
            self._accumulation, candidates, epoch, not self._has_all(candidates)
        )
        self._let_go()
        logging.warning("Gradients were not finite: %s", report.told())


def are_at_hand(counts: tuple[tf.Tensor, ...]) -> bool:
    """Returns whether reading counts waits for no device."""
    return all("CPU" in each.device for each in counts)


def total(counts: tuple[tf.Tensor, ...]) -> float:
    """Returns the sum of the replicas' counts."""
    return sum(map(float, counts))


def num_bytes(data) -> int:
    """Returns how much memory a batch has, on all local replicas."""
    return sum(
        leaf.dtype.size * math.prod(leaf.shape)
        for leaf in tf.nest.flatten(data, expand_composites=True)
        if isinstance(leaf, tf.Tensor)
    )
