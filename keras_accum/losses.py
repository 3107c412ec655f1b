"""The losses of a window: what each counts, and what `fit` reports of them.

A micro-batch counts by one weight, `microbatch_weight`, with which its
gradients are multiplied. Where the losses of a model need denominators of their
own, and the whole batch is known, each loss is divided by its window's
denominator instead, before there are gradients.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import microbatch as microbatches
from keras_accum import weighting
from keras_accum.gradients import keep_unless
from keras_accum.loss_tracker import WindowLoss
from keras_accum.microbatch import Microbatch
from keras_accum.rows import number_of_rows
from keras_accum.window_losses import WindowLosses


@dataclasses.dataclass(frozen=True)
class Divisors:
    """What a micro-batch's losses are divided by.

    Attributes:
        rows: The number of its rows; an integer scalar.
        denominators: Of the losses given to `compile`; None for a sum.
    """

    rows: tf.Tensor
    denominators: list[weighting.Denominator | None]


class Losses:
    """The losses of a model: how much they count, and what is known of them.

    Args:
        model: The model.
        window_losses: The metrics.
        is_custom: Returns whether a method of the model, by name, is not ours.

    Attributes:
        needs_denominators: Whether one weight per micro-batch was found not to
            fit all losses.
    """

    def __init__(
        self,
        model: keras.Model,
        window_losses: WindowLosses,
        is_custom: Callable[[str], bool],
    ) -> None:
        self._model, self._is_custom = model, is_custom
        self._window_losses = window_losses
        self._warnings: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Forgets what is known: another loss may have been given."""
        # Whether the loss is a sum over the rows; None before the first.
        self._found_sum: bool | None = None
        self.needs_denominators = False

    def of(self, losses: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns added losses and regularizers, as they count in a step.

        Args:
            losses: All of Keras's, the regularizers of weights last.
        """
        microbatch = microbatches.current(self._model)
        if microbatch is None or not self.is_sum:
            return losses
        count = len(losses) - self._number_of_regularizers()
        added, regularizers = losses[:count], losses[count:]
        share = microbatch.row_share
        if share is not None:
            added = [loss * tf.cast(share, loss.dtype) for loss in added]
        is_first = microbatch.is_first
        if is_first is True or not regularizers:
            return added + regularizers
        if is_first is False:
            return added
        is_later = tf.logical_not(is_first)
        return added + [keep_unless(is_later, loss) for loss in regularizers]

    def weight(self, x, y, y_pred, sample_weight) -> tf.Tensor | None:
        """Returns the weight of a micro-batch, as Keras divides its losses."""
        compiled = compat.compiled_loss(self._model)
        if compiled is None or not compat.is_built(compiled):
            return weighting.as_weight(number_of_rows(x))
        denominators = self._divisors(x, y, y_pred, sample_weight).denominators
        has_row_means = bool(compat.added_losses(self._model))
        self._find_differences(denominators, has_row_means)
        if not self.uses_denominators() and not weighting.is_exact(
            denominators, has_row_means
        ):
            self.warn_once(
                "One weight per micro-batch may not be exact for this model: "
                "the masks or reductions of its losses differ, or a loss "
                "returns a scalar that its `reduction` or the sample weights "
                "do not fit. See `microbatch_weight`."
            )
        return weighting.total_weight(denominators)

    def compute(self, x, y, y_pred, sample_weight, training: bool):
        """Computes the loss of a micro-batch.

        What its outputs report is recorded, and added in `count`.

        Args:
            x: Its inputs.
            y: Its labels, or None.
            y_pred: The model's outputs.
            sample_weight: Its sample weights, or None.
            training: Whether the step trains.
        """
        model = self._model
        microbatch = microbatches.current(model)
        compiled = compat.compiled_loss(model)
        with contextlib.ExitStack() as stack:
            for tracker in self._output_trackers(y, y_pred, sample_weight):
                recording = tracker.recording(microbatch.recorded_losses)
                stack.enter_context(recording)
            if microbatch.denominators is not None:
                if training:
                    check_policy_with_denominators(microbatch.nonfinite)
                divisors = self._divisors(x, y, y_pred, sample_weight)
                factors = self._shares_of_window(microbatch, divisors)
                stack.enter_context(compat.weighting_losses(compiled, factors))
            return compat.compute_loss(
                model, x, y, y_pred, sample_weight, training
            )

    def count(self, loss, x, y, y_pred, sample_weight) -> tf.Tensor | None:
        """Adds a loss to what `fit` reports; returns the gradients' weight.

        Args:
            loss: What `compute` returned.
            x: Inputs of the micro-batch.
            y: Its labels, or None.
            y_pred: The model's outputs.
            sample_weight: Its sample weights, or None.
        """
        model = self._model
        microbatch = microbatches.current(model)
        weight = None
        if microbatch.denominators is None:
            weight = model.microbatch_weight(x, y, y_pred, sample_weight)
        self._find_sum(microbatch, weight is None)
        self._regularize_without_rows(microbatch)
        outputs = self._output_trackers(y, y_pred, sample_weight)
        divisors = (
            self._divisors(x, y, y_pred, sample_weight) if outputs else None
        )
        rows = number_of_rows(x) if divisors is None else divisors.rows
        self._window_losses.make_tracker().add(
            microbatch.value_or(
                compat.unscale_loss(loss), microbatch.loss_without_rows
            ),
            microbatch.or_nothing(weight),
            microbatch.or_nothing(rows),
        )
        for index, tracker in enumerate(outputs):
            denominator = divisors.denominators[index]
            add_recorded(
                tracker,
                microbatch,
                None if denominator is None else denominator.value,
            )
        return weight

    def uses_denominators(self) -> bool:
        """Returns whether each loss is divided by a denominator of its own.

        For that the batch must be known before its first micro-batch, and
        what makes up the loss must be Keras's.
        """
        model = self._model
        return (
            self.needs_denominators
            and model.microbatch_size is not None
            and not self._is_custom("train_step")
            and not compat.has_custom_compute_loss(model)
            and not self._is_custom("microbatch_weight")
        )

    def measure(self, data) -> tf.Tensor:
        """Returns what a micro-batch adds to its window's denominators.

        Nothing is assigned.

        Args:
            data: The micro-batch.

        Returns:
            The number of rows, and the denominator of each loss; a vector.
        """
        model = self._model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        compiled = compat.compiled_loss(model)
        if compiled is None:
            return weighting.as_weight(number_of_rows(x))[None]
        with keras.StatelessScope(collect_losses=True) as scope:
            y_pred = forward(model, x, training=True)
        if not compat.is_built(compiled):
            compat.build_compiled_losses(compiled, y, y_pred, sample_weight)
        divisors = self._divisors(x, y, y_pred, sample_weight)
        self._find_differences(divisors.denominators, bool(scope.losses))
        rows = weighting.as_weight(divisors.rows)
        return tf.stack(
            [rows]
            + [
                0 * rows if d is None else d.value
                for d in divisors.denominators
            ]
        )

    @property
    def is_sum(self) -> bool:
        """Whether the loss is a sum over the rows, as far as is known."""
        microbatch = microbatches.current(self._model)
        if microbatch is not None and microbatch.denominators is not None:
            return True
        if self._found_sum is None:
            return weighting.is_sum(self._model.loss)
        return self._found_sum

    def warn_once(self, message: str) -> None:
        """Warns, unless it has done so before."""
        if message not in self._warnings:
            self._warnings.add(message)
            warnings.warn(message, stacklevel=4)

    def _output_trackers(self, y, y_pred, sample_weight):
        compiled = compat.compiled_loss(self._model)
        if compiled is None or not keras.tree.is_nested(y_pred):
            return []
        if not compat.is_built(compiled):
            compat.build_compiled_losses(compiled, y, y_pred, sample_weight)
        return self._window_losses.make_output_trackers()

    def _divisors(self, x, y, y_pred, sample_weight) -> Divisors:
        """Returns the `Divisors` of a micro-batch, computed once."""

        def measure():
            rows = number_of_rows(x)
            denominators = []
            compat.map_compiled_losses(
                compat.compiled_loss(self._model),
                lambda *loss_and_data: denominators.append(
                    weighting.loss_denominator(*loss_and_data, rows)
                ),
                y,
                y_pred,
                sample_weight,
            )
            return Divisors(rows, denominators)

        microbatch = microbatches.current(self._model)
        if microbatch is None:
            return measure()
        return microbatch.measured((x, y, y_pred, sample_weight), measure)

    def _find_differences(self, denominators, has_row_means):
        self.needs_denominators |= weighting.differ(denominators, has_row_means)

    def _shares_of_window(self, microbatch: Microbatch, divisors: Divisors):
        """Returns the shares of a micro-batch's losses in those of its window.

        Args:
            microbatch: With `denominators`. Gets its `row_share`.
            divisors: Its own.

        Returns:
            A scalar per loss; None for a sum, of which all counts.
        """
        # Keras divides means by the number of replicas.
        num_replicas = self._model.distribute_strategy.num_replicas_in_sync
        window_denominators = microbatch.denominators
        scales = tf.math.divide_no_nan(
            tf.cast(num_replicas, window_denominators.dtype),
            window_denominators,
        )
        row_scale, *scales = tf.unstack(scales)
        microbatch.row_share = row_scale * weighting.as_weight(divisors.rows)
        return [
            None if denominator is None else denominator.value * scale
            for denominator, scale in zip(
                divisors.denominators, scales, strict=True
            )
        ]

    def _number_of_regularizers(self):
        """Returns how many losses, at their end, regularize weights."""
        return sum(
            v.regularizer is not None for v in self._model.trainable_weights
        )

    def _regularize_without_rows(self, microbatch: Microbatch):
        """Computes the share of regularizers that counts without rows as well.

        Weight regularizers of a sum count once a window, in its first
        micro-batch, and each replica counts its share of them.
        """
        model, count = self._model, self._number_of_regularizers()
        # By hand, the first is known on the device alone.
        if microbatch.counts is None or microbatch.is_first is False:
            return
        if not count or not self.is_sum:
            return
        with tf.GradientTape() as tape:
            loss = tf.add_n(model.losses[-count:])
            share = loss / model.distribute_strategy.num_replicas_in_sync
            scaled = model.optimizer.scale_loss(share)
        microbatch.loss_without_rows = loss
        weights = model.trainable_weights
        gradients = tape.gradient(scaled, weights)
        microbatch.gradients_without_rows = dict(
            zip(map(id, weights), gradients, strict=True)
        )

    def _find_sum(self, microbatch: Microbatch, is_sum: bool):
        """Records what `microbatch_weight` said, which comes after the loss."""
        if (
            is_sum != self.is_sum
            and microbatch.is_first is not True
            and self._number_of_regularizers()
        ):
            self.warn_once(
                "`microbatch_weight` does not agree with the `reduction` of "
                "the loss given to `compile` on whether it is a sum: weight "
                "regularizers may count more than once in this window."
            )
        self._found_sum = is_sum


def forward(model: keras.Model, x, training: bool):
    """Calls a model, as Keras's steps do."""
    if compat.takes_training_argument(model):
        return model(x, training=training)
    return model(x)


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


def check_policy_with_denominators(nonfinite: str) -> None:
    """Raises a `ValueError` if a micro-batch may be skipped."""
    if nonfinite == "skip_microbatch":
        raise ValueError(
            '`nonfinite` must not be "skip_microbatch" with '
            "`microbatch_size` where the losses of a model have "
            "denominators that differ, by their masks or reductions. They "
            "are known before the gradients are, and would count what is "
            'skipped. Use "skip_window", or `accum_steps`.'
        )
