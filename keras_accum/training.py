"""The function that `fit` calls for every step.

```
train function                     one tf.function, on the host
├─ next(iterator)
├─ the window's first micro-batch  a program that starts the buffers
│  or another one                  a program that adds to them
└─ at the boundary: the update     a third one
```

Each program is compiled by XLA on its own, and the host picks: Python, where it
calls for one micro-batch at a time, and else conditionals around the programs.
A conditional inside one program would make every micro-batch carry the
optimizer's variables through it; one program for all micro-batches would have
to zero the buffers, or select, which reads them once more.
`docs/performance.md` has the figures.
"""

import functools
from collections.abc import Callable

from keras_accum import auto_size
from keras_accum import boundary
from keras_accum import discovery
from keras_accum import each_microbatch
from keras_accum import first_batch
from keras_accum import loops
from keras_accum import position as positions
from keras_accum import programs
from keras_accum import replicas
from keras_accum import rows
from keras_accum import steps
from keras_accum.control_flow import after
from keras_accum.control_flow import choose
from keras_accum.control_flow import choose_if_there
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
        accumulation, position = self._accumulation, self._accumulation.position
        if accumulation.progress.to_skip:
            return skip_batches(accumulation, iterator)
        with position.raising_errors(), accumulation.losing_failed_window():
            # A variable that had no gradient when the programs were traced may
            # have got one since, in batches of another structure. The program
            # that starts a window would not start its buffer.
            if self._signature not in (None, accumulation.window.signature()):
                self._programs, self._signature = Programs(accumulation), None
            place = self._programs.place()
            accumulation.window["losses"].resume()
            if accumulation.losses.are_to_be_measured():
                loop = self._programs.first_loop(place)
            else:
                loop = self._programs.loop(place)
            logs = loop(iterator)
            # A step that fails is not counted.
            if self._programs.counts_in_python:
                position.count(place)
            # The first call makes variables.
            self._signature = self._signature or accumulation.window.signature()
        accumulation.progress.advance(accumulation.model.steps_per_execution)
        return logs


class Programs:
    """The programs of a model that trains: for micro-batches, and the update.

    Args:
        accumulation: What the model accumulates in.

    Attributes:
        first: Trains on a window's first micro-batch, or on a whole window, on
            all replicas; called on the host as `first(args=(batch,))`. Returns
            the first replica's logs.
        next: As `first`, for the other micro-batches.
        update: Ends the window; called on the host. Returns the logs of all
            replicas, if there are several.
        counts_in_python: Whether Python counts micro-batches.
    """

    def __init__(self, accumulation) -> None:
        self._accumulation, model = accumulation, accumulation.model
        self._steps: dict[positions.Place, Callable] = {}
        self._loops: dict[positions.Place, Callable] = {}
        first, next_ = (
            functools.partial(steps.train_microbatch, accumulation, is_first)
            for is_first in (True, False)
        )
        if accumulation.size.value is None:
            self.first = programs.on_first_replica(model, first)
            self.next = programs.on_first_replica(model, next_)
            self.update = boundary.make_update(accumulation)
        else:
            each = each_microbatch.EachMicrobatch(
                accumulation, first, next_, trains=True
            )
            if accumulation.size.is_auto:
                self.update = boundary.make_update_for_host(accumulation)
                self.first = auto_size.Attempts(accumulation, each)
            else:
                self.update = boundary.make_update(accumulation)
                self.first = functools.partial(each, size=model.microbatch_size)
            self.next = None
        self.counts_in_python = (
            accumulation.size.value is None
            and accumulation.options.window_kind == "count"
            and model.steps_per_execution == 1
            and not model.run_eagerly
            # Each replica would be traced once for each place.
            and not replicas.has_several(model.distribute_strategy)
        )

    def place(self) -> positions.Place:
        """Returns where the next micro-batch is, as far as Python knows.

        For each place there is a function that does what is to be done there,
        and no more. Where the device picks, all variables of the model are
        handed to both branches of two conditionals, in every micro-batch.
        """
        if self.counts_in_python:
            return self._accumulation.position.place()
        self._accumulation.position.write()
        if self._accumulation.size.value is None:
            return positions.ON_DEVICE
        return positions.WHOLE

    def loop(self, place: positions.Place) -> Callable:
        """Returns a function of an iterator, which makes steps at a place."""
        if place not in self._loops:
            model, step = self._accumulation.model, self.step(place)
            if self._accumulation.size.is_auto:
                self._loops[place] = loops.make_host_loop(
                    model, lambda data, types: step(data)
                )
            else:
                self._loops[place] = loops.make_loop(
                    model, step, model.steps_per_execution
                )
        return self._loops[place]

    def first_loop(self, place: positions.Place) -> Callable:
        """Returns what `loop` does, with a look at the first batch's losses."""
        accumulation, model = self._accumulation, self._accumulation.model
        step = self.step(place)

        def look_and_step(data, types):
            if accumulation.losses.are_to_be_measured():
                first_batch.measure_losses(accumulation, data)
            if self._is_traced and loops.can_trace_for(types):
                step.get_concrete_function(types)
            return step(data)

        return loops.make_host_loop(model, look_and_step)

    def step(self, place: positions.Place) -> Callable:
        """Returns what `make_step` does, made once and traced once.

        Where XLA compiles nothing, what replicas do has no program of its own.
        """
        if place not in self._steps:
            step = self.make_step(place)
            if self._is_traced:
                step = programs.in_graph(step, reduce_retracing=True)
            self._steps[place] = step
        return self._steps[place]

    @property
    def _is_traced(self):
        accumulation = self._accumulation
        return not (accumulation.model.run_eagerly or accumulation.size.is_auto)

    def make_step(self, place: positions.Place) -> Callable:
        """Returns a function that trains on a batch, and may update."""
        accumulation = self._accumulation
        position = accumulation.position

        def step(data):
            in_branches = place == positions.ON_DEVICE
            discovery.find_optimizers(accumulation, data)
            discovery.build_for_resumed(accumulation, data, in_branches)
            is_first = place.is_first
            if is_first is None:
                is_first = position.is_first()
            logs = choose_if_there(
                data,
                is_first,
                functools.partial(self._start, place, data),
                functools.partial(self.next, args=(data,))
                if self.next
                else None,
                position.variable,
            )
            # A step that fails is not counted.
            with after(logs):
                is_last = place.is_last
                if is_last is None:
                    is_last = position.advance()
                return choose(
                    is_last,
                    lambda: boundary.merge_logs(logs, self.update()),
                    lambda: logs,
                )

        return step

    def _start(self, place, data):
        """Starts a window."""
        accumulation = self._accumulation
        if place == positions.WHOLE:
            return self.first(args=(data,))
        if place == positions.ON_DEVICE:
            strategy = accumulation.model.distribute_strategy
            size = accumulation.position.begin(
                accumulation.window["gradients"].updates_so_far(),
                lambda: rows.total_count(strategy, data),
                strategy.num_replicas_in_sync,
            )
            with after(size):
                return self.first(args=(data,))
        logs = self.first(args=(data,))
        # Here, so that no change of k traces anything, and what is saved in
        # mid-window has the optimizer's variables.
        programs.in_graph(self.next).get_concrete_function(args=(data,))
        programs.in_graph(self.update).get_concrete_function()
        return logs
