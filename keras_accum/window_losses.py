"""The losses that `fit` reports, as a part of a window."""

import itertools
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas
from keras_accum.loss_tracker import WindowLoss
from keras_accum.microbatch import Microbatch
from keras_accum.window import Part
from keras_accum.window import if_applied


class WindowLosses(Part):
    """The metrics that count a window as one batch: of the loss, of outputs.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        # What a checkpoint had of a window, until it goes on.
        self._restored: dict[str, np.ndarray] = {}

    @property
    def trackers(self) -> list[WindowLoss]:
        """The metrics that there are."""
        compiled = compat.compiled_loss(self._model)
        outputs = [] if compiled is None else compat.output_metrics(compiled)
        metrics = [compat.loss_tracker(self._model), *outputs]
        return [each for each in metrics if isinstance(each, WindowLoss)]

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that hold the sums of this window."""
        return [window for each in self.trackers for window in each.windows]

    @property
    def is_restored(self) -> bool:
        """Whether sums of a checkpoint wait for `resume`."""
        return bool(self._restored)

    def make_tracker(self) -> WindowLoss:
        """Returns the loss's metric, and puts it in the place of Keras's."""
        model = self._model
        if not isinstance(compat.loss_tracker(model), WindowLoss):
            made = replicas.on_each(model.distribute_strategy, WindowLoss)
            compat.set_loss_tracker(model, made)
            # It may have been traced with the other one.
            model.test_function = None
        return compat.loss_tracker(model)

    def make_output_trackers(self) -> list[WindowLoss]:
        """Returns the metrics of single outputs, in the place of Keras's."""
        model = self._model
        compiled = compat.compiled_loss(model)
        trackers = compat.output_metrics(compiled)
        if not all(isinstance(each, WindowLoss) for each in trackers):
            trackers = replicas.on_each(
                model.distribute_strategy,
                lambda: compat.replace_output_metrics(
                    compiled, lambda metric: WindowLoss(metric.name)
                ),
            )
            model.test_function = None
        return trackers

    def close(self, totals, applies) -> None:
        """Adds the window to what is reported, as one batch."""
        # What a checkpoint had was of this window.
        self._restored = {}
        num_replicas = self._model.distribute_strategy.num_replicas_in_sync
        totals = if_applied(totals, applies)
        for tracker, windows in self._by_tracker(totals):
            tracker.close(windows, 1 / num_replicas)

    def reset(self) -> None:
        """Ends the window as `close` does, on each replica by itself."""
        # Another worker may have failed.
        self._restored = {}
        for tracker in self.trackers:
            tracker.close_copies(self._model.distribute_strategy)

    def add_to(self, values: dict[int, tf.Tensor], totals: list) -> None:
        """Adds the window to values of the metrics' variables, by `id`."""
        for tracker, windows in self._by_tracker(totals):
            tracker.add_window_to(values, windows)

    def _by_tracker(self, totals):
        """Yields each metric with what its windows add up to."""
        totals = iter(totals)
        for tracker in self.trackers:
            yield tracker, list(itertools.islice(totals, len(tracker.windows)))

    def _by_name(self):
        """Returns the windows, by what a checkpoint calls them."""
        return {
            f"loss_{number}" + (f"_part_{index}" if index else ""): window
            for number, tracker in enumerate(self.trackers)
            for index, window in enumerate(tracker.windows)
        }

    def state(self) -> dict[str, np.ndarray]:
        """Returns the sums in this window."""
        totals = {k: replicas.total(v) for k, v in self._by_name().items()}
        return totals | self._restored

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Keeps the sums that `state` returned for `resume`."""
        self._restored = {
            name: value
            for name, value in state.items()
            if name.startswith("loss_")
        }

    def resume(self) -> None:
        """Continues with the sums that were restored.

        A step calls it: the start of its epoch has set all metrics to zero, and
        the first step makes those of single outputs.
        """
        if not self._restored:
            return
        for name in list(self._restored):
            _, _, index = name.partition("_part_")
            if index:
                self.make_tracker().window_of(int(index))
        for name, variable in self._by_name().items():
            if name in self._restored:
                value = self._restored.pop(name)
                strategy = self._model.distribute_strategy
                replicas.assign_total(strategy, variable, value)


def add_recorded(
    tracker: WindowLoss, microbatch: Microbatch, weight: tf.Tensor | None
) -> None:
    """Adds the recorded loss of an output, as that of a micro-batch.

    Args:
        tracker: The output's metric.
        microbatch: The micro-batch.
        weight: The denominator of the loss; None if it is a sum.
    """
    recorded = microbatch.recorded_losses.pop(id(tracker), None)
    if recorded is None:
        return
    loss, rows = recorded
    if rows is None:
        # Where the number of rows is not known while tracing, Keras counts
        # each batch once, and so a window.
        rows = tf.cast(microbatch.is_first, tf.int32)
    else:
        rows = microbatch.or_nothing(rows)
    tracker.add(
        microbatch.or_nothing(loss), microbatch.or_nothing(weight), rows
    )
