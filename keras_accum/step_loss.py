"""The loss of one micro-batch: computed, taken apart, and counted."""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence

import tensorflow as tf

from keras_accum import added_losses
from keras_accum import compat
from keras_accum import microbatch as microbatches
from keras_accum import parts
from keras_accum import warned
from keras_accum import weighting
from keras_accum.losses import Losses
from keras_accum.parts import Part
from keras_accum.parts import Terms
from keras_accum.rows import number_of_rows
from keras_accum.whole_loss import surrogate
from keras_accum.window_losses import add_recorded


class StepLoss:
    """The loss of a micro-batch, which is the current one.

    Args:
        losses: What is known of the model's losses.
        x: Inputs of the micro-batch.
        y: Its labels, or None.
        y_pred: The model's outputs.
        sample_weight: Its sample weights, or None.
        training: Whether the step trains.
        tape: What `tape_for` returned; None if no gradient is asked for.

    Attributes:
        value: The loss, as Keras computes it.
    """

    def __init__(
        self,
        losses: Losses,
        x,
        y,
        y_pred,
        sample_weight,
        training: bool,
        tape: tf.GradientTape | None = None,
    ) -> None:
        self._losses, self._model = losses, losses.model
        self._batch, self._training = (x, y, y_pred, sample_weight), training
        self._tape = tape
        self._microbatch = microbatches.current(self._model)
        self._terms: Terms | None = None
        # What is traced is for all micro-batches, this one too.
        if tf.inside_function() and not self._microbatch.is_share:
            losses.ask_for_sum(*self._batch)
        self.value = self._compute()

    def take_apart(self, scaled: tf.Tensor) -> list[Part]:
        """Returns the parts of the loss that have denominators of their own.

        Args:
            scaled: The loss, as the optimizer scales it.
        """
        if self._terms is None:
            return [self._whole([scaled])]
        strategy = self._model.distribute_strategy
        return parts.apart(
            self._terms,
            self.value,
            scaled,
            self._losses.divisors(*self._batch).of_terms(self._kinds()),
            strategy.num_replicas_in_sync,
        )

    def count(self, found: Sequence[Part] = ()) -> None:
        """Adds the loss to what `fit` reports.

        Args:
            found: What `take_apart` returned, if it was called.
        """
        losses, microbatch = self._losses, self._microbatch
        found = found or [self._whole()]
        # Where it was taken apart, regularizers do not depend on it.
        losses.find_sum(
            all(each.weight is None for each in found),
            warns=self._terms is None and microbatch.is_first is not True,
        )
        if losses.is_sum:
            added_losses.regularize_without_rows(self._model, microbatch)
        tracker = losses.make_tracker()
        for index, part in enumerate(found):
            tracker.add(
                microbatch.value_or(
                    compat.unscale_loss(part.loss),
                    microbatch.loss_without_rows,
                ),
                microbatch.or_nothing(
                    microbatch.row_share if microbatch.is_share else part.weight
                ),
                # As Keras counts them.
                microbatch.or_nothing(number_of_rows(self._batch[0])),
                is_weighted=microbatch.is_share,
                index=index,
            )
        self._count_outputs()

    def _count_outputs(self):
        """Adds the losses of single outputs."""
        losses, microbatch = self._losses, self._microbatch
        trackers = losses.output_trackers(*self._batch[1:])
        if not trackers:
            return
        divisors = losses.divisors(*self._batch)
        for tracker, divisor in zip(
            trackers, divisors.denominators, strict=True
        ):
            weight = None if divisor is None else divisor.value
            if microbatch.whole is not None:
                # What was recorded is that of the batch.
                weight = microbatch.row_share
            add_recorded(tracker, microbatch, weight)

    def _whole(self, targets=()):
        weight = None
        if not self._microbatch.is_share:
            weight = self._model.microbatch_weight(*self._batch)
        return Part(self.value, weight, targets)

    def _compute(self):
        """Computes it; what its outputs report is recorded."""
        model, losses, microbatch = self._model, self._losses, self._microbatch
        if microbatch.is_share and self._training:
            warned.check_policy_of_share(microbatch.nonfinite)
        if microbatch.whole is not None:
            return self._share_of_whole()
        compiled = compat.compiled_loss(model)
        with contextlib.ExitStack() as stack:
            if compiled is not None and compat.is_built(compiled):
                record = microbatch.loss_values.record
                stack.enter_context(compat.showing_values(compiled, record))
            # The loss of a whole batch is one of all replicas.
            if any(losses.found.undivided) and microbatch.shown_losses is None:
                num_replicas = model.distribute_strategy.num_replicas_in_sync
                dividing = compat.dividing_losses(
                    compiled, losses.found.undivided, num_replicas
                )
                stack.enter_context(dividing)
            for tracker in losses.output_trackers(*self._batch[1:]):
                recording = tracker.recording(microbatch.recorded_losses)
                stack.enter_context(recording)
            if microbatch.denominators is not None:
                stack.enter_context(self._multiplied_by_shares())
            elif self._tape is not None and losses.may_be_apart():
                stack.enter_context(self._recorded_if_apart())
            return compat.compute_loss(model, *self._batch, self._training)

    @contextlib.contextmanager
    def _recorded_if_apart(self) -> Iterator[None]:
        """Records what the loss adds up, if it is to be taken apart."""
        losses, compiled = self._losses, compat.compiled_loss(self._model)
        losses.build(*self._batch[1:])
        if not losses.are_apart(self._batch, self._kinds()):
            yield
            return
        self._terms = terms = Terms(self._tape)
        with contextlib.ExitStack() as stack:
            # A step may compute another loss after this one.
            stack.enter_context(
                compat.attribute(self._microbatch, "terms", terms)
            )
            if compiled is not None:
                stack.enter_context(
                    compat.recording_losses(compiled, terms.record_compiled)
                )
            yield

    def _kinds(self):
        """Returns the kinds of losses that layers have added."""
        added = compat.added_losses(self._model)
        return self._losses.kinds_of_added(len(added))

    @contextlib.contextmanager
    def _multiplied_by_shares(self) -> Iterator[None]:
        """Multiplies the losses by their shares in those of the window.

        The share of a sum is all of it.
        """
        microbatch, model = self._microbatch, self._model
        divisors = self._losses.divisors(*self._batch)
        # Keras divides means by the number of replicas.
        num_replicas = model.distribute_strategy.num_replicas_in_sync
        window_denominators = microbatch.denominators
        scales = tf.math.divide_no_nan(
            tf.cast(num_replicas, window_denominators.dtype),
            window_denominators,
        )
        row_scale, *scales = tf.unstack(scales)
        microbatch.row_share = row_scale * weighting.as_weight(divisors.rows)
        compiled = compat.compiled_loss(model)
        if compiled is None:
            yield
            return
        factors = [
            None if denominator is None else denominator.value * scale
            for denominator, scale in zip(
                divisors.denominators, scales, strict=True
            )
        ]
        with compat.weighting_losses(compiled, factors):
            yield

    def _share_of_whole(self):
        """Returns the share of a micro-batch in the loss of its batch."""
        model, microbatch = self._model, self._microbatch
        _, y, y_pred, sample_weight = self._batch
        whole = microbatch.whole
        num_replicas = model.distribute_strategy.num_replicas_in_sync
        rows = number_of_rows(sample_weight, y, y_pred)
        rows, total = map(weighting.as_weight, (rows, whole.rows))
        share = tf.math.divide_no_nan(rows * num_replicas, total)
        microbatch.row_share = share
        for tracker, value in zip(
            self._losses.output_trackers(y, y_pred, sample_weight),
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
        if self._losses.found.adds_losses:
            for added in model.losses:
                added = compat.aggregate_loss(model, added)
                loss += tf.cast(added, loss.dtype)
        return loss


def tape_for(losses: Losses) -> tf.GradientTape:
    """Returns a tape for a loss that `take_apart` may be asked of."""
    return tf.GradientTape(persistent=losses.may_be_apart())
