"""The loss of a window, from the losses of its micro-batches."""

import contextlib
import warnings

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import microbatch
from keras_accum import replicas
from keras_accum import weighting
from keras_accum.accumulator import keep_unless
from keras_accum.loss_tracker import WindowLoss


class LossMixin:
    """What each micro-batch's loss counts, and what `fit` reports of it.

    A micro-batch counts by one weight, `microbatch_weight`, with which its
    gradients are multiplied. Where the losses of a model need denominators of
    their own, and the whole batch is known, each loss is divided by its
    window's denominator instead, before there are gradients: see
    `_uses_totals`.
    """

    # Whether the loss is a sum over the rows; None before the first of them.
    _accum_is_sum: bool | None = None
    # Whether one weight per micro-batch was found not to fit all losses.
    _accum_needs_totals = False
    # The warnings that there were.
    _accum_warned: tuple[str, ...] = ()

    @property
    def losses(self) -> list[tf.Tensor]:
        """Losses from `add_loss` and regularizers, as in `keras.Model`.

        If the loss is a sum over the window, so are these in a train step. A
        weight regularizer counts once a window, and is left out after that.
        """
        losses = super().losses
        now = microbatch.current(self)
        if now is None or not self._is_sum():
            return losses
        number = len(losses) - self._number_of_regularizers()
        own, shared = losses[:number], losses[number:]
        if now.row_share is not None:
            own = [loss * tf.cast(now.row_share, loss.dtype) for loss in own]
        first = self._is_first()
        if first is True or not shared:
            return own + shared
        if first is False:
            return own
        return own + [
            keep_unless(tf.logical_not(first), loss) for loss in shared
        ]

    def microbatch_weight(
        self, x, y, y_pred, sample_weight=None
    ) -> tf.Tensor | None:
        """How much a micro-batch counts: the denominator of its loss.

        The default takes it from the losses given to `compile`: the number of
        entries, without masked ones, or what else the loss's `reduction`
        divides by. Without such a loss it is the number of rows, which is right
        for a mean over the batch. Override it for a loss of your own.

        There is one weight for all losses of a micro-batch. That is exact where
        their denominators are proportional to each other, as they are without
        masks. It is not exact for outputs whose masks, or whose kinds of
        reduction, differ, nor for a masked loss together with `add_loss` or an
        activity regularizer, which are means over the rows. The weight is then
        the sum of the denominators, and a warning says so, once. With
        `microbatch_size` the whole batch is known, each of these losses is
        divided by its own denominator, and this method is not called.

        Args:
            x: Inputs of the micro-batch.
            y: Its labels, or None.
            y_pred: The model's outputs.
            sample_weight: Its sample weights, or None.

        Returns:
            A float scalar, or None where the loss is a sum and not a mean, so
            that gradients just add up.
        """
        compiled = compat.compiled_loss(self)
        if compiled is None or not compat.is_built(compiled):
            return weighting.as_weight(weighting.number_of_rows(x))
        denominators = self._denominators(x, y, y_pred, sample_weight)
        has_row_means = bool(compat.own_losses(self))
        self._accum_needs_totals |= weighting.differ(
            denominators, has_row_means
        )
        if not self._uses_totals() and not weighting.is_exact(
            denominators, has_row_means
        ):
            self._warn_once(
                "One weight per micro-batch may not be exact for this model: "
                "the masks or reductions of its losses differ, or a loss "
                "returns a scalar that its `reduction` or the sample weights "
                "do not fit. See `microbatch_weight`."
            )
        return weighting.total_weight(denominators)

    def _microbatch_loss(self, x, y, y_pred, sample_weight, training):
        """The loss of a micro-batch; what its outputs report is held back."""
        now, compiled = microbatch.current(self), compat.compiled_loss(self)
        with contextlib.ExitStack() as stack:
            for tracker in self._output_trackers(y, y_pred, sample_weight):
                stack.enter_context(tracker.held_back())
            if now.totals is not None:
                self._check_policy_with_totals(training)
                parts = self._denominators(x, y, y_pred, sample_weight)
                factors = self._parts_of_window(now, x, parts)
                stack.enter_context(compat.weighting_losses(compiled, factors))
            return compat.compute_loss(
                self, x, y, y_pred, sample_weight, training
            )

    def _count_loss(self, loss, x, y, y_pred, sample_weight):
        """Adds the loss to what `fit` reports; returns the weight."""
        now = microbatch.current(self)
        weight = None
        if now.totals is None:
            weight = self.microbatch_weight(x, y, y_pred, sample_weight)
        self._learn_whether_loss_is_sum(weight is None)
        self._regularize_without_rows(now)
        self._loss_tracker_of_windows().add(
            now.value_or(compat.unscale_loss(loss), now.loss_without_rows),
            weight if weight is None else now.or_nothing(weight),
            now.or_nothing(weighting.number_of_rows(x)),
        )
        outputs = self._output_trackers(y, y_pred, sample_weight)
        if outputs:
            denominators = self._denominators(x, y, y_pred, sample_weight)
            for tracker, each in zip(outputs, denominators, strict=True):
                tracker.add_held(
                    each and each.value, self._is_first(), now.or_nothing
                )
        return weight

    def _check_policy_with_totals(self, training):
        if training and self.nonfinite == "skip_microbatch":
            raise ValueError(
                '`nonfinite` must not be "skip_microbatch" with '
                "`microbatch_size` where the losses of a model have "
                "denominators that differ, by their masks or reductions. They "
                "are known before the gradients are, and would count what is "
                'skipped. Use "skip_window", or `accum_steps`.'
            )

    def _loss_tracker_of_windows(self):
        if not isinstance(compat.loss_tracker(self), WindowLoss):
            made = replicas.on_each(self.distribute_strategy, WindowLoss)
            compat.set_loss_tracker(self, made)
            # It may have been traced with the other one.
            self.test_function = None
        return compat.loss_tracker(self)

    def _output_trackers(self, y, y_pred, sample_weight):
        """The metrics behind the losses of single outputs, of windows each."""
        compiled = compat.compiled_loss(self)
        if compiled is None or not keras.tree.is_nested(y_pred):
            return []
        if not compat.is_built(compiled):
            compat.build_compiled_losses(compiled, y, y_pred, sample_weight)
        return self._trackers_of_outputs()

    def _trackers_of_outputs(self):
        compiled = compat.compiled_loss(self)
        trackers = compat.output_metrics(compiled)
        if not all(isinstance(each, WindowLoss) for each in trackers):
            trackers = replicas.on_each(
                self.distribute_strategy,
                lambda: compat.replace_output_metrics(
                    compiled, lambda metric: WindowLoss(metric.name)
                ),
            )
            self.test_function = None
        return trackers

    def _denominators(self, x, y, y_pred, sample_weight):
        """The `Denominator`s of the losses given to `compile`."""
        rows = weighting.number_of_rows(x)
        denominators = []
        compat.map_compiled_losses(
            compat.compiled_loss(self),
            lambda *loss_and_data: denominators.append(
                weighting.loss_denominator(*loss_and_data, rows)
            ),
            y,
            y_pred,
            sample_weight,
        )
        return denominators

    def _uses_totals(self):
        """Whether each loss of a batch is divided by its own denominator.

        For that the batch must be known before its first micro-batch, and
        what makes up the loss must be Keras's.
        """
        cls = type(self)
        return (
            bool(self.microbatch_size)
            and self._accum_needs_totals
            and not self._has_custom_step("train_step")
            and not compat.has_custom_compute_loss(self)
            and cls.microbatch_weight is LossMixin.microbatch_weight
        )

    def _addends_of_totals(self, data):
        """What a micro-batch adds to the totals; nothing is assigned."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        rows = weighting.as_weight(weighting.number_of_rows(x))
        compiled = compat.compiled_loss(self)
        if compiled is None:
            return rows[None]
        with keras.StatelessScope(collect_losses=True) as scope:
            y_pred = self._forward(x, training=True)
        if not compat.is_built(compiled):
            compat.build_compiled_losses(compiled, y, y_pred, sample_weight)
        parts = self._denominators(x, y, y_pred, sample_weight)
        self._accum_needs_totals |= weighting.differ(
            parts, has_row_means=bool(scope.losses)
        )
        return tf.stack(
            [rows] + [0 * rows if d is None else d.value for d in parts]
        )

    def _parts_of_window(self, now, x, parts):
        """How much the losses of a micro-batch count in their window's.

        Args:
            now: The micro-batch, with `totals`. Gets its `row_share`.
            x: Its inputs.
            parts: The `Denominator`s of its losses.

        Returns:
            A scalar per loss; None for a sum, of which all counts.
        """
        # Keras divides means by the number of replicas.
        number = self.distribute_strategy.num_replicas_in_sync
        scales = tf.math.divide_no_nan(
            tf.cast(number, now.totals.dtype), now.totals
        )
        rows, *totals = tf.unstack(scales)
        now.row_share = rows * weighting.as_weight(weighting.number_of_rows(x))
        return [
            None if part is None else part.value * total
            for part, total in zip(parts, totals, strict=True)
        ]

    def _number_of_regularizers(self):
        """How many of `super().losses`, at their end, regularize weights."""
        return sum(v.regularizer is not None for v in self.trainable_weights)

    def _regularize_without_rows(self, now):
        """Notes the share of a replica without rows that count in these.

        Weight regularizers of a sum count once a window, in its first
        micro-batch, and each replica counts its part of them.
        """
        regularized = self._number_of_regularizers()
        if now.counts is None or now.first is False:
            return
        if not regularized or not self._is_sum():
            return
        with tf.GradientTape() as tape:
            loss = tf.add_n(self.losses[-regularized:])
            share = loss / self.distribute_strategy.num_replicas_in_sync
            scaled = self.optimizer.scale_loss(share)
        now.loss_without_rows = loss
        now.gradients_without_rows = tape.gradient(
            scaled, self.trainable_weights
        )

    def _is_sum(self):
        """Whether the loss is a sum over the rows, as far as is known."""
        now = microbatch.current(self)
        if now is not None and now.totals is not None:
            return True
        if self._accum_is_sum is None:
            return weighting.is_sum(self.loss)
        return self._accum_is_sum

    def _forget_kind_of_loss(self):
        """Another loss may have been given to `compile`."""
        self._accum_is_sum = None
        self._accum_needs_totals = False

    def _learn_whether_loss_is_sum(self, is_sum):
        """Notes what `microbatch_weight` said, which comes after the loss."""
        if (
            is_sum != self._is_sum()
            and self._is_first() is not True
            and self._number_of_regularizers()
        ):
            self._warn_once(
                "`microbatch_weight` does not agree with the `reduction` of "
                "the loss given to `compile` on whether it is a sum: weight "
                "regularizers may count more than once in this window."
            )
        self._accum_is_sum = is_sum

    def _warn_once(self, message):
        if message not in self._accum_warned:
            self._accum_warned = (*self._accum_warned, message)
            warnings.warn(message, stacklevel=4)
