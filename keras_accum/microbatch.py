"""The micro-batch that a step is at work on, in this replica."""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Self

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum.annotations import Gradient
from keras_accum.calls import Call
from keras_accum.finite import is_finite
from keras_accum.gradients import choose_all
from keras_accum.gradients import select_all
from keras_accum.layer_moments import Moments
from keras_accum.layer_moments import moments_of
from keras_accum.loss_values import LossValues
from keras_accum.origins import Origins

# A user's `train_step` stands between who sets it and who reads it. Replicas
# are traced in threads of their own, each with a context of its own.
_CURRENT = contextvars.ContextVar("keras_accum_microbatch", default=None)


class Microbatch:
    """A micro-batch: what a step knows of it, and what it records.

    A replica may get no rows, of a last batch that is short. What was computed
    from nothing may be no number; it counts for nothing and changes nothing.

    Args:
        model: The model that trains.
        first: Whether it is the first of its window: a bool, a bool scalar, or
            a function that returns one.
        has_rows: A bool tensor; None if there are rows for certain.
        nonfinite: The policy for gradients that are not finite.
        is_replicated: Whether there are other replicas.
        size: How many rows it has; None if that is not known.
        denominators: What the rows and the denominators of the losses add up to
            in the window, on all replicas: a float vector; None if unknown.
        whole: The `WholeLoss` of its batch, if that couples rows; or None.

    Attributes:
        nonfinite, size: As above.
        is_of_batch: Whether its window is a batch, forgotten if a step fails.
        is_finite: Whether its gradients are; a bool tensor. None if that is
            not known yet, or does not matter.
        calls: Those of `accumulate`, in their order. They are added to the
            window when the step is over, and there is no doubt that it counts.
        origins: What the gradients of its tapes are of.
        graph: The graph that its step is traced in, if any.
        rows: How many it has, in a step of the user's own; None if that is not
            known.
        row_share: If `is_share`, how much a mean over the rows counts.
        loss_without_rows: The loss if there are no rows, or none count.
        gradients_without_rows: Its gradients, by the `id` of the variable,
            where they are not zeros.
        moments: The `Moments` of its calls of layers that normalize over it.
        assigned: Keras's variables that it assigns, by `id`.
        loss_values: What its losses returned, as `LossValues`.
        recorded_losses: What the metrics of single outputs were given, by `id`.
        terms: What its loss adds up, as `parts.Terms`, while that is recorded.
        shown_losses: What `model.losses` is to be, instead of what it is.
        asked_for_losses: Then, whether it was asked for.
    """

    def __init__(
        self,
        model: keras.Model,
        first: bool | tf.Tensor | Callable[[], tf.Tensor],
        has_rows: tf.Tensor | None = None,
        nonfinite: str = "propagate",
        is_replicated: bool = False,
        size: tf.Tensor | None = None,
        denominators: tf.Tensor | None = None,
        whole=None,
    ) -> None:
        self.model = model
        self.has_rows, self.size = has_rows, size
        self.denominators, self.whole = denominators, whole
        self.calls: list[Call] = []
        self.rows: tf.Tensor | None = None
        self.origins = Origins()
        self.is_finite = self.row_share = None
        self.loss_without_rows = tf.zeros(())
        self.gradients_without_rows: dict[int, Gradient] = {}
        self.moments: list[Moments] = []
        self.assigned: dict[int, keras.Variable] = {}
        self.loss_values = LossValues()
        self.recorded_losses: dict[int, tuple] = {}
        self.terms = None
        self.shown_losses: list[tf.Tensor] | None = None
        self.asked_for_losses = False
        self._first, self.nonfinite = first, nonfinite
        self.is_of_batch = not callable(first)
        self._changes_nothing = not is_replicated and nonfinite == "propagate"
        self.graph = compat.current_graph()
        self._before, self._looked_at = {}, []
        self._statistics, self._measured = set(), None

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *unused) -> None:
        _CURRENT.reset(self._token)

    @functools.cached_property
    def is_first(self) -> bool | tf.Tensor:
        """Whether it is the first of its window; asked before it is added."""
        return self._first() if callable(self._first) else self._first

    @property
    def is_share(self) -> bool:
        """Whether its loss is a share of that of its batch, which is known."""
        return self.denominators is not None or self.whole is not None

    @property
    def counts(self) -> tf.Tensor | None:
        """Whether it counts, as far as is known; None if it does."""
        if self.is_finite is None or self.has_rows is None:
            return self.has_rows if self.is_finite is None else self.is_finite
        return tf.logical_and(self.has_rows, self.is_finite)

    @contextlib.contextmanager
    def watched(self, layers: bool) -> Iterator[None]:
        """Watches what the step assigns to Keras's variables.

        Args:
            layers: Whether to record what BatchNormalization normalizes with,
                instead of updating its statistics.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(compat.assigning_through(self._value_for))
            if layers:
                record = self._record_moments
                stack.enter_context(compat.recording_moments(record))
            yield

    def measured(self, batch: tuple, measure: Callable):
        """Returns what `measure` finds in a batch, and calls it once.

        Args:
            batch: What it is measured in: nested tensors.
            measure: A function without arguments.
        """
        # A branch's tensors are not known outside of it.
        if compat.current_graph() is not self.graph:
            return measure()
        leaves = keras.tree.flatten(batch)
        if self._measured is None or not is_same(self._measured[0], leaves):
            self._measured = leaves, measure()
        return self._measured[1]

    def not_looked_at(self, gradients: Sequence) -> list:
        """Returns those that it has not returned before."""
        seen = set(map(id, self._looked_at))
        new = [g for g in gradients if g is not None and id(g) not in seen]
        # They are kept, and so their `id`s.
        self._looked_at += new
        return new

    def find_finite(self, is_finite: tf.Tensor) -> None:
        """Decides whether some gradients are finite, by a bool tensor.

        If not, the variables assigned so far get back what they held.
        """
        if self.is_finite is not None:
            is_finite = tf.logical_and(self.is_finite, is_finite)
        for variable, before in self._before.values():
            variable.assign(tf.where(is_finite, variable.value, before))
        # Only now: what is assigned is selected by it from here on.
        self.is_finite = is_finite

    def value_or(self, value: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """Returns `value`, or `other` if the micro-batch does not count."""
        counts = self.counts
        if counts is None:
            return value
        value = tf.convert_to_tensor(value)
        return tf.where(counts, value, tf.cast(other, value.dtype))

    def or_nothing(self, value: tf.Tensor | None) -> tf.Tensor | None:
        """Returns `value`, or zeros if the micro-batch does not count."""
        if value is None or self.counts is None:
            return value
        return self.value_or(value, tf.zeros_like(value))

    def gradients_or_nothing(self, call: Call) -> list:
        """Returns a call's gradients, or those without rows if none count."""
        if self.counts is None:
            return call.gradients
        choose = choose_all if self.is_finite is None else select_all
        return choose(self.counts, call.gradients, call.without_rows)

    def record(self, call: Call, place: tuple) -> None:
        """Records a call of `accumulate`, and where in the step it is."""
        self.calls.append(call.placed(place, self.gradients_without_rows))
        # They belong to the first call after the loss was computed.
        self.gradients_without_rows = {}

    def _record_moments(self, layer, *inputs_and_moments):
        # Tensors of another graph, such as that of a loop, stay in it. Then the
        # layer does what it does in Keras.
        if compat.current_graph() is self.graph:
            self.moments.append(moments_of(layer, *inputs_and_moments))
            self._statistics |= set(map(id, compat.moving_statistics(layer)))

    def _value_for(self, variable, value):
        """Returns what is assigned to one of Keras's variables."""
        if id(variable) in self._statistics:
            # The window's end assigns it.
            return variable.value
        # Of others, such as the state of random generators, all replicas have
        # the same, and shall go on having it.
        is_floating = tf.as_dtype(variable.dtype).is_floating
        if not is_floating:
            return value
        self.assigned[id(variable)] = variable
        if self._changes_nothing:
            return value
        # Also where some gradients were looked at: others may follow.
        if self.nonfinite == "skip_microbatch":
            self._record_value(variable)
        if self.nonfinite == "skip_window":
            # The gradients are looked at too late for that.
            value = tf.convert_to_tensor(value)
            value = tf.where(is_finite(value), value, variable.value)
        return self.value_or(value, variable)

    def _record_value(self, variable):
        if (
            compat.current_graph() is self.graph
            and id(variable) not in self._before
        ):
            self._before[id(variable)] = variable, tf.identity(variable.value)


def current(model: keras.Model) -> Microbatch | None:
    """Returns the micro-batch that `model` is at work on, in this thread."""
    microbatch = _CURRENT.get()
    is_of_model = microbatch is not None and microbatch.model is model
    return microbatch if is_of_model else None


def is_same(some: Sequence, others: Sequence) -> bool:
    """Returns whether two lists hold the very same objects."""
    return list(map(id, some)) == list(map(id, others))
