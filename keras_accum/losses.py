"""The losses of a window: what each counts, and what `fit` reports of them.

A micro-batch counts by one weight, `microbatch_weight`, with which its
gradients are multiplied. Where the losses of a model need denominators of their
own, and the whole batch is known, each loss is divided by its window's
denominator instead, before there are gradients.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import added_losses
from keras_accum import compat
from keras_accum import microbatch as microbatches
from keras_accum import warned
from keras_accum import weighting
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from keras_accum.loss_tracker import WindowLoss
from keras_accum.overrides import Overrides
from keras_accum.rows import number_of_rows
from keras_accum.steps import forward
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

    def of_terms(
        self, kinds: Sequence[Kind | None]
    ) -> list[weighting.Denominator | None]:
        """Returns them, and those of losses of some kinds that layers add."""
        by_rows = weighting.of_rows(self.rows)
        return self.denominators + [
            None if kind is Kind.SUM else by_rows for kind in kinds
        ]


class Losses:
    """The losses of a model: how much they count, and what is known of them.

    Args:
        model: The model.
        window_losses: The metrics.
        overrides: Which of the model's methods are a user's own.

    Attributes:
        model: As above.
        findings: What was measured on the first batch; None before that.
        needs_denominators: Whether one weight per micro-batch was found not to
            fit all losses.
    """

    def __init__(
        self,
        model: keras.Model,
        window_losses: WindowLosses,
        overrides: Overrides,
    ) -> None:
        self.model, self._overrides = model, overrides
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
        microbatch = microbatches.current(self.model)
        if microbatch is None or microbatch.shown_losses is None:
            return None
        microbatch.asked_for_losses = True
        return microbatch.shown_losses

    def of(self, losses: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns added losses and regularizers, as they count in a step.

        Args:
            losses: All of Keras's, the regularizers of weights last.
        """
        microbatch = microbatches.current(self.model)
        if microbatch is not None and microbatch.terms is not None:
            return microbatch.terms.record_added(losses)
        if microbatch is None or not self.is_sum:
            return losses
        return added_losses.counted(
            self.model, losses, microbatch, self.found.added
        )

    def weight(self, x, y, y_pred, sample_weight) -> tf.Tensor | None:
        """Returns the weight of a micro-batch, as Keras divides its losses."""
        if self.found.couples_rows and not self.use_whole_batch():
            names = self.found.coupled_names(self.model)
            self.warn_once(warned.coupled(names))
        compiled = compat.compiled_loss(self.model)
        kind = self.found.compute_loss
        if kind is None and compiled is None:
            added = self.kinds_of_added(len(compat.added_losses(self.model)))
            self.find_differences((), added)
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
        denominators = self.divisors(x, y, y_pred, sample_weight).denominators
        added = self.kinds_of_added(len(compat.added_losses(self.model)))
        self.find_differences(denominators, added)
        is_exact = weighting.is_exact(denominators, added)
        if not self.uses_denominators() and not is_exact:
            self.warn_once(warned.ONE_WEIGHT)
        return weighting.total_weight(denominators)

    def are_to_be_measured(self) -> bool:
        """Returns whether the next batch is to tell what the losses are.

        An override of `train_step` may take data of any form, which is not what
        to make variables from.
        """
        return self.findings is None and (
            self.model.built or self._overrides.step("train_step") is None
        )

    def have_own_step(self) -> bool:
        """Returns whether a user's `train_step` computes the loss."""
        return self._overrides.replaces("train_step")

    def use_whole_batch(self, trains: bool = True) -> bool:
        """Returns whether the loss is computed of the batch as a whole.

        An override of a step may give other data to ours.

        Args:
            trains: Whether the model trains.
        """
        name = "train_step" if trains else "test_step"
        return (
            self.found.couples_rows
            and self.found.is_apart
            and self.model.microbatch_size is not None
            and self._overrides.step(name) is None
        )

    def uses_denominators(self) -> bool:
        """Returns whether each loss is divided by a denominator of its own.

        For that the batch must be known before its first micro-batch, and
        what makes up the loss must be Keras's.
        """
        model = self.model
        return (
            self.needs_denominators
            and model.microbatch_size is not None
            and not self.have_own_step()
            and not compat.has_custom_compute_loss(model)
            and not self._overrides.has("microbatch_weight")
        )

    def may_be_apart(self) -> bool:
        """Returns whether losses may have gradients and sums of their own.

        They may where they have denominators of their own, and the batch is
        not known before its first micro-batch.
        """
        model = self.model
        if (
            model.microbatch_size is not None
            or compat.has_custom_compute_loss(model)
            or self._overrides.has("microbatch_weight")
        ):
            return False
        # Where steps run eagerly, a tape that is asked twice takes more memory.
        return tf.inside_function() or self._are_several(self.found.added)

    def are_apart(self, batch: tuple, kinds: tuple) -> bool:
        """Returns whether losses are to have gradients and sums of their own.

        Args:
            batch: A micro-batch, as for `find_divisors`.
            kinds: Of what layers add.
        """
        if not self._are_several(kinds):
            return False
        # What they follow from is asked, and not yet how much they are: later
        # that is computed of the values of the losses. What the call assigns,
        # such as the state of a seed, is forgotten.
        with keras.StatelessScope():
            denominators = self.find_divisors(*batch).denominators
        self.find_differences(denominators, kinds)
        if weighting.has_guess(denominators):
            self.warn_once(warned.ONE_WEIGHT)
        return weighting.differ(denominators, kinds)

    def _are_several(self, added: tuple) -> bool:
        """Returns whether those of `compile` and added ones are two or more."""
        compiled, count = compat.compiled_loss(self.model), len(added)
        if compiled is not None and compat.is_built(compiled):
            count += compat.number_of_losses(compiled)
        return count > 1

    def measure(self, data) -> tf.Tensor:
        """Returns what a micro-batch adds to its window's denominators.

        Nothing is assigned.

        Args:
            data: The micro-batch.

        Returns:
            The number of rows, and the denominator of each loss; a vector.
        """
        model = self.model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with keras.StatelessScope(collect_losses=True) as scope:
            y_pred = forward(model, x, training=True)
        self.build(y, y_pred, sample_weight)
        divisors = self.divisors(x, y, y_pred, sample_weight)
        added = self.kinds_of_added(len(scope.losses))
        self.find_differences(divisors.denominators, added)
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
        microbatch = microbatches.current(self.model)
        if microbatch is not None and microbatch.is_share:
            return True
        if self._found_sum is None:
            found = self.found
            if found.compute_loss is not None:
                return found.compute_loss is Kind.SUM
            if not found.compiled and set(found.added) == {Kind.SUM}:
                return True
            if found.compiled and None not in found.compiled:
                return all(kind is Kind.SUM for kind in found.compiled)
            return weighting.is_sum(self.model.loss)
        return self._found_sum

    @property
    def found(self) -> Findings:
        """What was measured on the first batch, as far as anything was."""
        return self.findings or Findings()

    def warn_once(self, message: str) -> None:
        """Warns, unless it has done so before."""
        if message not in self._warnings:
            self._warnings.add(message)
            warnings.warn(message, stacklevel=4)

    def output_trackers(self, y, y_pred, sample_weight) -> list[WindowLoss]:
        """Returns the metrics of single outputs; none if there is one."""
        compiled = compat.compiled_loss(self.model)
        if compiled is None or not keras.tree.is_nested(y_pred):
            return []
        self.build(y, y_pred, sample_weight)
        return self._window_losses.make_output_trackers()

    def make_tracker(self) -> WindowLoss:
        """Returns the metric of the loss."""
        return self._window_losses.make_tracker()

    def build(self, y, y_pred, sample_weight) -> None:
        """Builds the losses given to `compile`, if there are any."""
        compiled = compat.compiled_loss(self.model)
        if compiled is not None and not compat.is_built(compiled):
            compat.build_compiled_losses(compiled, y, y_pred, sample_weight)

    def divisors(self, *batch) -> Divisors:
        """Returns the `Divisors` of a micro-batch, computed once.

        Args:
            *batch: As for `find_divisors`.
        """
        microbatch = microbatches.current(self.model)
        if microbatch is None:
            return self.find_divisors(*batch)
        find = functools.partial(self.find_divisors, *batch)
        return microbatch.measured(batch, find)

    def find_divisors(self, x, y, y_pred, sample_weight) -> Divisors:
        """Computes the `Divisors` of a micro-batch."""
        rows = number_of_rows(sample_weight, y, y_pred, x)
        compiled = compat.compiled_loss(self.model)
        if compiled is None:
            return Divisors(rows, [])
        microbatch = microbatches.current(self.model)
        kinds, denominators = iter(self.found.compiled), []

        def add(loss, y, y_pred, sample_weight):
            values = None
            if microbatch is not None:
                values = microbatch.loss_values.of(loss, y, y_pred)
            kind = next(kinds, None)
            denominators.append(
                weighting.loss_denominator(
                    loss, y, y_pred, sample_weight, rows, kind, values
                )
            )

        compat.map_compiled_losses(compiled, add, y, y_pred, sample_weight)
        return Divisors(rows, denominators)

    def find_differences(self, denominators, added) -> None:
        """Records whether denominators are not proportional."""
        self.needs_denominators |= weighting.differ(denominators, added)

    def kinds_of_added(self, count: int) -> tuple[Kind | None, ...]:
        """Returns the kinds of losses that layers add, if there are `count`."""
        kinds = self.found.added
        return kinds if len(kinds) == count else (None,) * count

    def ask_for_sum(self, *batch) -> None:
        """Asks an override of `microbatch_weight`, before there is a loss.

        How regularizers count depends on it.

        Args:
            *batch: What `microbatch_weight` takes.
        """
        is_overridden = self._overrides.has("microbatch_weight")
        if self._found_sum is None and is_overridden:
            self._found_sum = self.model.microbatch_weight(*batch) is None

    def find_sum(self, is_sum: bool, warns: bool) -> None:
        """Records what `microbatch_weight` said, which comes after the loss."""
        if (
            warns
            and is_sum != self.is_sum
            and added_losses.number_of_regularizers(self.model)
        ):
            self.warn_once(warned.REGULARIZERS)
        self._found_sum = is_sum
