"""The function that `fit` calls for every step.

```
train function                     one tf.function, on the host
├─ next(iterator)
├─ a micro-batch                   a program that adds to the buffers, or
│                                  starts them where they are empty
└─ at the boundary: the update     another one
```

Each program is compiled by XLA on its own, and the host picks: Python, where it
calls for one micro-batch at a time, and else a conditional around the update. A
conditional inside one program would make every micro-batch carry the
optimizer's variables through it.
"""

import functools
from collections.abc import Callable

from keras_accum import auto_size
from keras_accum import boundary
from keras_accum import discovery
from keras_accum import each_microbatch
from keras_accum import first_batch
from keras_accum import iterators
from keras_accum import loops
from keras_accum import programs
from keras_accum import replicas
from keras_accum import rows
from keras_accum import steps
from keras_accum.control_flow import after
from keras_accum.control_flow import choose
from keras_accum.control_flow import if_there
from keras_accum.epochs import skip_batches


class TrainFunction:
    """The function that `fit` calls with an iterator over batches.

    It trains on `model.steps_per_execution` of them, or on those that are left,
    and returns the logs. It raises `tf.errors.OutOfRangeError`, or for an
    iterator of Python's `StopIteration`, when there are none.

    Args:
        accumulation: What the model accumulates in.
    """

    def __init__(self, accumulation) -> None:
        self._accumulation = accumulation
        self._programs, self._signature = Programs(accumulation), None

    def __call__(self, iterator):
        """Trains on the next batches."""
        accumulation, window = self._accumulation, self._accumulation.window
        iterators.read_from(iterator)
        if accumulation.progress.to_skip:
            return skip_batches(accumulation, iterator)
        with (
            accumulation.position.raising_errors(),
            accumulation.losing_failed_window(),
        ):
            # A variable that had no gradient when the programs were traced may
            # have got one since, in batches of another structure. The program
            # that was traced would not start its buffer.
            if self._signature not in (None, window.signature()):
                self._programs, self._signature = Programs(accumulation), None
            window["losses"].resume()
            loop, is_last = self._programs.loop(), self._programs.is_last()
            logs = accumulation.watch.look(loop(iterator))
            # A step that fails is not counted.
            if is_last is not None:
                self._programs.count(is_last)
            # The first call makes variables.
            self._signature = self._signature or window.signature()
        accumulation.progress.advance(accumulation.model.steps_per_execution)
        return logs


class Programs:
    """The programs of a model that trains: for micro-batches, and the update.

    Args:
        accumulation: What the model accumulates in.

    Attributes:
        microbatch: Trains on a micro-batch, or on a whole window, on all
            replicas; called on the host as `microbatch(args=(batch,))`. Returns
            the first replica's logs.
        update: Ends the window; called on the host. Returns the logs of all
            replicas, if there are several.
        counts_in_python: Whether Python counts micro-batches.
    """

    def __init__(self, accumulation) -> None:
        self._accumulation, model = accumulation, accumulation.model
        size, train = accumulation.size, steps.train_microbatch
        make_update = boundary.make_update
        if size.value is None:
            # The buffers tell which one is the window's first.
            self.microbatch = programs.on_first_replica(
                model, functools.partial(train, accumulation, None)
            )
        else:
            each = each_microbatch.EachMicrobatch(
                accumulation, functools.partial(train, accumulation), True
            )
            self.microbatch = functools.partial(each, size=size.value)
            if size.is_auto:
                make_update = boundary.make_update_for_host
                self.microbatch = auto_size.Attempts(accumulation, each)
        self.update = make_update(accumulation)
        self.counts_in_python = (
            size.value is None
            and accumulation.options.window_kind == "count"
            and model.steps_per_execution == 1
            and not model.run_eagerly
            # An update with reductions is no function: see `make_update`.
            and not replicas.has_several(model.distribute_strategy)
        )

    def is_last(self) -> bool | None:
        """Returns whether the next micro-batch ends its window.

        Where the device picks, all variables of the model are handed to both
        branches of a conditional, in every micro-batch. It does, and this is
        None, where Python does not count.
        """
        position = self._accumulation.position
        if self.counts_in_python:
            return position.next_is_last()
        position.write()
        return None

    def count(self, is_last: bool) -> None:
        """Counts a micro-batch where Python does, and may end the window."""
        if is_last:
            self.update()
        self._accumulation.position.count(is_last)

    def loop(self) -> Callable:
        """Returns a function of an iterator, which makes steps."""
        if self._accumulation.losses.are_to_be_measured():
            # Made for one call, and not kept.
            return self._make_first_loop()
        return self._later_loop

    @functools.cached_property
    def _later_loop(self):
        model = self._accumulation.model
        if self._accumulation.size.is_auto:
            return loops.make_host_loop(model, self.step)
        return loops.make_loop(model, self.step, model.steps_per_execution)

    def _make_first_loop(self):
        """Returns what looks at the first batch's losses, too."""
        model, step = self._accumulation.model, self.step
        look = functools.partial(first_batch.look_at, self._accumulation)
        if self._accumulation.size.is_auto:
            return loops.make_host_loop(model, step, look)
        return loops.make_looking_loop(model, self._later_loop, step, look)

    @functools.cached_property
    def step(self) -> Callable:
        """What `make_step` returns, made once and traced once.

        Where XLA compiles nothing, what replicas do has no program of its own.
        """
        step = self.make_step()
        if self._is_traced:
            step = programs.in_graph(step, reduce_retracing=True)
        return step

    @property
    def _is_traced(self):
        accumulation = self._accumulation
        return not (accumulation.model.run_eagerly or accumulation.size.is_auto)

    def make_step(self) -> Callable:
        """Returns a function that trains on a batch, and may update."""
        accumulation, position = self._accumulation, self._accumulation.position
        is_window = accumulation.size.value is not None
        by_device = not (is_window or self.counts_in_python)

        def step(data):
            discovery.find_optimizers(accumulation, data)
            discovery.build_for_resumed(accumulation, data)
            add = functools.partial(self.microbatch, args=(data,))
            if by_device:
                add = functools.partial(self._begin_and, add, data)
            logs = if_there(data, add, position.variable)
            # A step that fails is not counted.
            with after(logs):
                if not self.counts_in_python:
                    logs = choose(
                        is_window or position.advance(),
                        lambda: boundary.merge_logs(logs, self.update()),
                        lambda: logs,
                    )
                return accumulation.watch.returned(logs, data)

        return step

    def _begin_and(self, add, data):
        """Adds a batch to a window whose size the device may have to fix."""
        accumulation = self._accumulation
        strategy = accumulation.model.distribute_strategy
        size = accumulation.position.begin_if_first(
            accumulation.window["gradients"].updates_so_far(),
            lambda: rows.total_count(strategy, data),
            strategy.num_replicas_in_sync,
            accumulation.window["noise"].for_schedule(),
        )
        with after(size):
            return add()
