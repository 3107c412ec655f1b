"""The steps on one batch in micro-batches, on each replica.

What a micro-batch must know of the whole batch is found out first.
"""

from collections.abc import Callable

import tensorflow as tf
from absl import logging

from keras_accum import compat
from keras_accum import discovery
from keras_accum import programs
from keras_accum import reduction
from keras_accum import replicas
from keras_accum import rows as row_counts
from keras_accum import weighting
from keras_accum import whole_batch
from keras_accum.microbatching import fold
from keras_accum.rows import as_tensors
from keras_accum.rows import take_first
from keras_accum.whole_loss import WholeLoss


class EachMicrobatch:
    """A function of a batch: steps on its micro-batches, on each replica.

    It is for the host: in cross-replica context. Where the losses of a batch
    need denominators of their own, these are summed first, in a pass without
    gradients. Where the loss is one of the batch as a whole, that is computed
    first, in such a pass too.

    Args:
        accumulation: What the model accumulates in.
        step: A step. It is called with whether the micro-batch is the first, a
            bool scalar, with the micro-batch, and by name with its window's
            `denominators` or the `whole` loss, if these are used.
        trains: Whether the model trains.
    """

    def __init__(self, accumulation, step: Callable, trains: bool) -> None:
        self._model = model = accumulation.model
        self._losses, self._trains = accumulation.losses, trains
        self._gradients = accumulation.window["gradients"]
        self._whole_batch = whole_batch.WholeBatch(accumulation, trains)
        # A `tf.function` takes one number of arguments.
        self._plain, self._with_denominators, self._with_whole = (
            programs.in_loop(model, kind(step))
            for kind in (plain, taking_denominators, taking_whole)
        )
        self._measure = programs.in_loop(model, self._losses.measure)
        self._fold = programs.with_loop(model, self._fold_local)
        self._is_traced = False

    def __call__(self, args: tuple, size: int | None):
        """Makes the steps; see `fold`.

        Args:
            args: The batch alone, as for `programs.on_replicas`.
            size: Most rows of a micro-batch.

        Returns:
            The logs of the last step: on the first replica, or, of an
            evaluation, the mean.
        """
        (data,), strategy = args, self._model.distribute_strategy
        num_microbatches = row_counts.num_microbatches(strategy, data, size)
        logs = self._fold(data, size, num_microbatches)
        if not replicas.has_several(strategy):
            return logs
        if self._trains:
            return programs.first_replica(strategy, logs)
        return programs.mean_of_replicas(strategy, logs)

    def _fold_local(self, data, size, num_microbatches):
        data = as_tensors(data)
        if self._losses.use_whole_batch(self._trains):
            return self._fold_whole(data, size, num_microbatches)
        if not self._losses.uses_denominators():
            self._look_at_losses(take_first(data, size))
        step, denominators = self._plain, ()
        if self._losses.uses_denominators():
            step = self._with_denominators
            denominators = (self._denominators(data, size),)
        return fold(
            data,
            size,
            lambda each: step(tf.constant(True), each, *denominators),
            lambda logs, each: step(tf.constant(False), each, *denominators),
            num_microbatches,
        )

    def _fold_whole(self, data, size, num_microbatches):
        summary, gradients = self._whole_batch(data, size)
        step = self._with_whole
        return fold(
            (data, gradients),
            size,
            lambda each: step(tf.constant(True), *each, summary),
            lambda logs, each: step(tf.constant(False), *each, summary),
            num_microbatches,
        )

    def memory_plan(self, data, size: int) -> compat.MemoryPlan:
        """Returns what a compiled step takes, on all local replicas.

        Args:
            data: A batch, in cross-replica context.
            size: Most rows of a micro-batch.
        """
        if not self._is_traced:
            self._trace_for_any_rows(data)
            self._is_traced = True
        plan = self.call_with_step(data, size, compat.memory_plan)
        local = self._model.distribute_strategy.experimental_local_results
        return compat.MemoryPlan(*(sum(local(each)) for each in plan))

    def call_with_step(self, data, size: int, function: Callable):
        """Calls a function with a step and its arguments, on each replica.

        Args:
            data: A batch, in cross-replica context.
            size: Rows of the micro-batch, which is the batch's first.
            function: Takes the step, a `tf.function` unless the model runs
                eagerly, and what it is called with.
        """
        strategy = self._model.distribute_strategy
        local = as_tensors(replicas.first_local(strategy, data))
        step, *args = self._with_arguments(take_first(local, size))
        return self._on_replicas(
            lambda: function(step, tf.constant(True), *args)
        )

    def _on_replicas(self, function):
        with replicas.without_warning_of_slow_runs():
            return programs.with_loop(self._model, function)()

    def _trace_for_any_rows(self, data):
        """Traces the step for micro-batches of any number of rows.

        Else it is traced for one number, then for another, which TensorFlow
        takes for any: of a large model, that costs seconds and 100 MiB.
        """
        strategy = self._model.distribute_strategy
        local = as_tensors(replicas.first_local(strategy, data))
        step, *args = self._with_arguments(take_first(local, 1))
        _, *others = self._with_arguments(take_first(local, 2))
        specs = tf.nest.map_structure(spec_of_both, args, others)
        try:
            self._on_replicas(
                lambda: step.get_concrete_function(tf.constant(True), *specs)
            )
        except Exception as error:  # noqa: BLE001
            # A layer may be written for one number: it is traced for that then.
            logging.debug("A step was not traced for any rows: %s", error)

    def _with_arguments(self, data):
        """Returns the step, and what it is called with after the first."""
        if self._losses.use_whole_batch():
            return self._with_whole, data, *self._whole_batch.example(data)
        if self._losses.uses_denominators():
            losses = compat.number_of_losses(compat.compiled_loss(self._model))
            zeros = weighting.as_weight(tf.zeros(1 + losses))
            return self._with_denominators, data, zeros
        return self._plain, data

    def _look_at_losses(self, data):
        """Traces a step on a micro-batch, which shows the losses' kinds."""
        if self._losses.have_own_step():
            return
        if self._model.run_eagerly:
            self._losses.measure(data)
        else:
            # It is called later, and not traced a second time.
            look = programs.in_graph(self._plain)
            look.get_concrete_function(tf.constant(True), data)

    def _denominators(self, data, size):
        """Returns the window's denominators, over all replicas."""
        total = fold(
            data,
            size,
            self._measure,
            lambda total, each: total + self._measure(each),
        )
        destination = self._gradients.make_accumulator().weight
        return reduction.sum_over_replicas(total, destination)


def spec_of_both(first, second):
    """Returns what a program has to know of a value that is either one."""
    spec, other = discovery.spec_of(first), discovery.spec_of(second)
    return spec and spec.most_specific_common_supertype([other])


def plain(step: Callable) -> Callable:
    """Returns a step of a micro-batch alone."""
    return lambda is_first, data: step(is_first, data)


def taking_denominators(step: Callable) -> Callable:
    """Returns a step of a micro-batch and its window's denominators."""
    return lambda is_first, data, denominators: step(
        is_first, data, denominators=denominators
    )


def taking_whole(step: Callable) -> Callable:
    """Returns a step of a micro-batch, its gradients, and the batch's loss."""

    def step_of_whole(is_first, data, gradients, summary):
        whole = WholeLoss(*summary, gradients)
        return step(is_first, data, whole=whole)

    return step_of_whole
