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

from keras_accum import added_losses
from keras_accum import compat
from keras_accum import microbatch as microbatches
from keras_accum import overrides
from keras_accum import warned
from keras_accum import weighting
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from keras_accum.microbatch import Microbatch
from keras_accum.rows import number_of_rows
from keras_accum.steps import forward
from keras_accum.whole_loss import surrogate
from keras_accum.window_losses import WindowLosses
from keras_accum.window_losses import add_recorded


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
        findings: What was measured on the first batch; None before that.
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
        self.findings: Findings | None = None
        self.needs_denominators = False

    def shown(self) -> list[tf.Tensor] | None:
        """Returns what the added losses are to seem, or None; records that."""
        microbatch = microbatches.current(self._model)
        if microbatch is None or microbatch.shown_losses is None:
            return None
        microbatch.asked_for_losses = True
        return microbatch.shown_losses

    def of(self, losses: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns added losses and regularizers, as they count in a step.

        Args:
            losses: All of Keras's, the regularizers of weights last.
        """
        microbatch = microbatches.current(self._model)
        if microbatch is None or not self.is_sum:
            return losses
        return added_losses.counted(
            self._model, losses, microbatch, self._found.added
        )

    def weight(self, x, y, y_pred, sample_weight) -> tf.Tensor | None:
        """Returns the weight of a micro-batch, as Keras divides its losses."""
        if self._found.couples_rows and not self.use_whole_batch():
            names = self._found.coupled_names(self._model)
            self.warn_once(warned.coupled(names))
        compiled = compat.compiled_loss(self._model)
        kind = self._found.compute_loss
        if kind is None and compiled is None:
            added = self._kinds_of_added(len(compat.added_losses(self._model)))
            self._find_differences((), added)
            if set(added) == {Kind.SUM}:
                kind = Kind.SUM
            elif self.needs_denominators and not self.uses_denominators():
                self.warn_once(warned.ONE_WEIGHT)
        if kind is Kind.SUM:
            return None
        if (
            compiled is None
            or not compat.is_built(compiled)
            or kind in (Kind.ROW_MEAN, Kind.COUPLED)
        ):
            rows = number_of_rows(sample_weight, y, y_pred, x)
            return weighting.as_weight(rows)
        denominators = self._divisors(x, y, y_pred, sample_weight).denominators
        added = self._kinds_of_added(len(compat.added_losses(self._model)))
        self._find_differences(denominators, added)
        is_exact = weighting.is_exact(denominators, added)
        if not self.uses_denominators() and not is_exact:
            self.warn_once(warned.ONE_WEIGHT)
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
        if microbatch.is_share and training:
            warned.check_policy_of_share(microbatch.nonfinite)
        if microbatch.whole is not None:
            return self._share_of_whole(microbatch, y, y_pred, sample_weight)
        compiled = compat.compiled_loss(model)
        with contextlib.ExitStack() as stack:
            # The loss of a whole batch is one of all replicas.
            if any(self._found.undivided) and microbatch.shown_losses is None:
                num_replicas = model.distribute_strategy.num_replicas_in_sync
                dividing = compat.dividing_losses(
                    compiled, self._found.undivided, num_replicas
                )
                stack.enter_context(dividing)
            for tracker in self._output_trackers(y, y_pred, sample_weight):
                recording = tracker.recording(microbatch.recorded_losses)
                stack.enter_context(recording)
            if microbatch.denominators is not None:
                divisors = self._divisors(x, y, y_pred, sample_weight)
                factors = self._shares_of_window(microbatch, divisors)
                if compiled is not None:
                    stack.enter_context(
                        compat.weighting_losses(compiled, factors)
                    )
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
        if not microbatch.is_share:
            weight = model.microbatch_weight(x, y, y_pred, sample_weight)
        self._find_sum(microbatch, weight is None)
        if self.is_sum:
            added_losses.regularize_without_rows(model, microbatch)
        outputs = self._output_trackers(y, y_pred, sample_weight)
        divisors = (
            self._divisors(x, y, y_pred, sample_weight) if outputs else None
        )
        self._window_losses.make_tracker().add(
            microbatch.value_or(
                compat.unscale_loss(loss), microbatch.loss_without_rows
            ),
            microbatch.or_nothing(
                microbatch.row_share if microbatch.is_share else weight
            ),
            # As Keras counts them.
            microbatch.or_nothing(number_of_rows(x)),
            is_weighted=microbatch.is_share,
        )
        for index, tracker in enumerate(outputs):
            denominator = divisors.denominators[index]
            output_weight = None if denominator is None else denominator.value
            if microbatch.whole is not None:
                # What was recorded is that of the batch.
                output_weight = microbatch.row_share
            add_recorded(tracker, microbatch, output_weight)
        return weight

    def are_to_be_measured(self) -> bool:
        """Returns whether the next batch is to tell what the losses are.

        An override of `train_step` may take data of any form, which is not what
        to make variables from.
        """
        return (
            self.findings is None
            and not self._is_custom("train_step")
            and (
                self._model.built
                or overrides.is_default(type(self._model).train_step)
            )
        )

    def have_own_step(self) -> bool:
        """Returns whether a user's `train_step` computes the loss."""
        is_own = overrides.is_own(type(self._model).train_step)
        return is_own or self._is_custom("train_step")

    def use_whole_batch(self, trains: bool = True) -> bool:
        """Returns whether the loss is computed of the batch as a whole.

        An override of a step may give other data to ours.

        Args:
            trains: Whether the model trains.
        """
        name = "train_step" if trains else "test_step"
        return (
            self._found.couples_rows
            and self._found.is_apart
            and self._model.microbatch_size is not None
            and overrides.is_default(getattr(type(self._model), name))
            and not self._is_custom(name)
        )

    def uses_denominators(self) -> bool:
        """Returns whether each loss is divided by a denominator of its own.

        For that the batch must be known before its first micro-batch, and
        what makes up the loss must be Keras's.
        """
        model = self._model
        return (
            self.needs_denominators
            and model.microbatch_size is not None
            and not self.have_own_step()
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
        with keras.StatelessScope(collect_losses=True) as scope:
            y_pred = forward(model, x, training=True)
        if compiled is not None and not compat.is_built(compiled):
            compat.build_compiled_losses(compiled, y, y_pred, sample_weight)
        divisors = self._divisors(x, y, y_pred, sample_weight)
        added = self._kinds_of_added(len(scope.losses))
        self._find_differences(divisors.denominators, added)
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
        if microbatch is not None and microbatch.is_share:
            return True
        if self._found_sum is None:
            found = self._found
            if found.compute_loss is not None:
                return found.compute_loss is Kind.SUM
            if not found.compiled and set(found.added) == {Kind.SUM}:
                return True
            if found.compiled and None not in found.compiled:
                return all(kind is Kind.SUM for kind in found.compiled)
            return weighting.is_sum(self._model.loss)
        return self._found_sum

    @property
    def _found(self) -> Findings:
        return self.findings or Findings()

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
            rows = number_of_rows(sample_weight, y, y_pred, x)
            denominators = []
            kinds = iter(self._found.compiled)
            if compat.compiled_loss(self._model) is None:
                return Divisors(rows, [])
            compat.map_compiled_losses(
                compat.compiled_loss(self._model),
                lambda *loss_and_data: denominators.append(
                    weighting.loss_denominator(
                        *loss_and_data, rows, next(kinds, None)
                    )
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

    def _find_differences(self, denominators, added):
        self.needs_denominators |= weighting.differ(denominators, added)

    def _kinds_of_added(self, count: int) -> tuple[Kind | None, ...]:
        """Returns the kinds of losses that layers add, if there are `count`."""
        kinds = self._found.added
        return kinds if len(kinds) == count else (None,) * count

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

    def _share_of_whole(self, microbatch, y, y_pred, sample_weight):
        """Returns the share of a micro-batch in the loss of its batch."""
        model, whole = self._model, microbatch.whole
        num_replicas = model.distribute_strategy.num_replicas_in_sync
        rows = number_of_rows(sample_weight, y, y_pred)
        rows, total = map(weighting.as_weight, (rows, whole.rows))
        share = tf.math.divide_no_nan(rows * num_replicas, total)
        microbatch.row_share = share
        for tracker, value in zip(
            self._output_trackers(y, y_pred, sample_weight),
            whole.of_outputs,
            strict=True,
        ):
            # Keras counts a batch once where its rows are known late.
            microbatch.recorded_losses[id(tracker)] = value, None
        # What Keras divides by the number of replicas.
        loss = whole.value * tf.cast(share / num_replicas, whole.value.dtype)
        if whole.gradients:
            # The loss has the value of the one, and the gradient of the other.
            slope = tf.cast(surrogate(whole, y_pred), loss.dtype)
            loss += slope - tf.stop_gradient(slope)
        if self._found.adds_losses:
            for added in model.losses:
                added = compat.aggregate_loss(model, added)
                loss += tf.cast(added, loss.dtype)
        return loss

    def _find_sum(self, microbatch: Microbatch, is_sum: bool):
        """Records what `microbatch_weight` said, which comes after the loss."""
        if (
            is_sum != self.is_sum
            and microbatch.is_first is not True
            and added_losses.number_of_regularizers(self._model)
        ):
            self.warn_once(warned.REGULARIZERS)
        self._found_sum = is_sum
