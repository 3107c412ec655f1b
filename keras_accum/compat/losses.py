"""The losses of `compile`, of layers, and how they are weighted."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.backend.common import masking
from keras.src.losses import loss as loss_module

from keras_accum.compat.hooks import Hook
from keras_accum.compat.hooks import attribute

_scalings = [
    Hook(loss_module, name)
    for name in (
        "scale_loss_for_distribution",
        "unscale_loss_for_distribution",
    )
]


def unscale_loss(loss):
    """Undoes the division of the loss by the number of replicas."""
    return loss_module.unscale_loss_for_distribution(loss)


@contextlib.contextmanager
def as_on_one_replica() -> Iterator[None]:
    """Keeps Keras from dividing losses by the number of replicas.

    It does so with most means, but not where a function returned a scalar.
    """
    with contextlib.ExitStack() as stack:
        for hook in _scalings:
            stack.enter_context(hook.calling(lambda scale, value: value))
        yield


def keras_mask(tensor):
    """Returns the mask that a layer attached to its output, or None."""
    return masking.get_keras_mask(tensor)


def set_keras_mask(tensor, mask) -> None:
    """Attaches a mask to an output, as a layer does."""
    masking.set_keras_mask(tensor, mask)


def cached_logits(tensor):
    """Returns what a probability was made of, or None.

    Keras's crossentropies look for it, which keeps their gradients from
    vanishing where the probability is 0 or 1 in rounding.
    """
    if hasattr(tensor, "_keras_logits"):
        return tensor._keras_logits
    is_activation = tf.is_symbolic_tensor(tensor) and tensor.op.type in (
        "Sigmoid",
        "Softmax",
    )
    return tensor.op.inputs[0] if is_activation else None


def set_cached_logits(tensor, logits) -> None:
    """Attaches what a probability was made of, as an activation does."""
    tensor._keras_logits = logits


def merge_mask(sample_weight, mask, dtype, reduction):
    """Returns the weights of a loss's entries, as `keras.Loss` merges them."""
    return loss_module.apply_mask(
        sample_weight, mask, dtype=dtype, reduction=reduction
    )


def align_ranks(values, weight):
    """Returns `values` and `weight`, in the ranks that `keras.Loss` uses."""
    return loss_module.squeeze_or_expand_to_same_rank(values, weight)


def compiled_loss(model):
    """Returns the object that computes the losses of `compile`, or None.

    It pairs each loss with its output, label and sample weight.
    """
    return getattr(model, "_compile_loss", None)


def added_losses(model) -> list[tf.Tensor]:
    """Returns what layers added by `add_loss` and activity regularizers."""
    return [loss for _, loss in added_by(model)]


def added_by(model) -> list[tuple[str, tf.Tensor]]:
    """Returns the added losses, each with the name of its layer."""
    return [
        (layer.name, loss)
        for layer in model._flatten_layers()
        for loss in layer._get_own_losses()
    ]


def map_compiled_losses(compiled, function, y, y_pred, sample_weight):
    """Calls `function` for each loss of `compile`, with what the loss sees.

    Args:
        compiled: What `compiled_loss` returned, after its first call.
        function: Called as `function(loss, y_true, y_pred, sample_weight)`.
        y: Labels of the batch, in any structure that Keras takes.
        y_pred: Outputs of the model.
        sample_weight: Sample weights of the batch, or None.
    """
    # A copy of the object walks the structures, with other leaves: Keras
    # reconciles lists, tuples, dicts and partial losses in many ways.
    walker = object.__new__(type(compiled))
    walker.__dict__.update(compiled.__dict__)
    walker._flat_losses = [
        entry._replace(
            loss=_Leaf(_itself(entry.loss), function), loss_weights=None
        )
        for entry in compiled._flat_losses
    ]
    walker._metrics = [None] * len(walker._flat_losses)
    walker(y, y_pred, sample_weight)


@contextlib.contextmanager
def weighting_losses(compiled, factors) -> Iterator[None]:
    """Multiplies the losses of `compile` by factors, within the context.

    Args:
        compiled: What `compiled_loss` returned, built.
        factors: One scalar per loss; None to leave it as it is.
    """
    entries = [
        entry
        if factor is None
        else entry._replace(
            loss_weights=factor
            if entry.loss_weights is None
            else entry.loss_weights * factor
        )
        for entry, factor in zip(compiled._flat_losses, factors, strict=True)
    ]
    with attribute(compiled, "_flat_losses", entries):
        yield


@contextlib.contextmanager
def dividing_losses(compiled, are_divided, divisor: int) -> Iterator[None]:
    """Divides losses of `compile`, and what is reported of them.

    Args:
        compiled: What `compiled_loss` returned, built.
        are_divided: Whether to, for each loss.
        divisor: By what.
    """
    entries = [
        entry._replace(loss=_Divided(entry.loss, divisor)) if divided else entry
        for entry, divided in zip(
            compiled._flat_losses, are_divided, strict=True
        )
    ]
    with attribute(compiled, "_flat_losses", entries):
        yield


@contextlib.contextmanager
def recording_losses(compiled, record) -> Iterator[None]:
    """Passes what losses of `compile` return through a function.

    Args:
        compiled: What `compiled_loss` returned, built.
        record: Called as `record(value)` in the losses' order, before their
            loss weights; returns what to go on with.
    """
    entries = [
        entry._replace(loss=_Recorded(entry.loss, record))
        for entry in compiled._flat_losses
    ]
    with attribute(compiled, "_flat_losses", entries):
        yield


@contextlib.contextmanager
def showing_values(compiled, record) -> Iterator[None]:
    """Shows what the `call`s of losses of `compile` return.

    Args:
        compiled: What `compiled_loss` returned, built.
        record: Called as `record(loss, y_true, y_pred, values)`, with what the
            loss was called with.
    """
    entries = [
        entry._replace(loss=_Shown(entry.loss, record))
        # An override of `__call__` may do without, or call it for parts.
        if type(entry.loss).__call__ is keras.Loss.__call__
        else entry
        for entry in compiled._flat_losses
    ]
    with attribute(compiled, "_flat_losses", entries):
        yield


def build_compiled_losses(compiled, y, y_pred, sample_weight) -> None:
    """Builds `compiled` and its metrics for a batch, without running it."""

    def symbolic(leaf):
        if leaf is None:
            return None
        return keras.KerasTensor(
            leaf.shape, backend.standardize_dtype(leaf.dtype)
        )

    batch = keras.tree.map_structure(symbolic, (y, y_pred, sample_weight))
    backend.compute_output_spec(compiled, *batch)


def loss_names(compiled) -> list[str]:
    """Returns the names of the losses given to `compile`."""
    return [entry.loss.name for entry in compiled._flat_losses]


def number_of_losses(compiled) -> int:
    """Returns how many losses `compile` was given; `compiled` is built."""
    return len(compiled._flat_losses)


def output_metrics(compiled) -> list[keras.Metric]:
    """Returns the metrics of single outputs; none if there is one output."""
    return list(compiled._metrics)


def replace_output_metrics(compiled, make) -> list[keras.Metric]:
    """Replaces what `output_metrics` returns, and returns the new ones.

    Args:
        compiled: What `compiled_loss` returned, built.
        make: A function from an old metric to the new one.
    """
    # The same list: what tracks the metrics has it too.
    compiled._metrics[:] = [make(metric) for metric in compiled._metrics]
    return output_metrics(compiled)


def is_built(compiled) -> bool:
    """Returns whether `compiled` has met its first batch."""
    return bool(compiled.built)


def _itself(loss):
    """Returns the loss that others stand in for."""
    while isinstance(loss, _StandIn):
        loss = loss.loss
    return loss


class _StandIn:
    """Is called instead of a loss, within a context."""

    def __init__(self, loss):
        self.loss = loss


class _Divided(_StandIn):
    """Stands in for a loss in `dividing_losses`."""

    def __init__(self, loss, divisor):
        super().__init__(loss)
        self._divisor = divisor

    def __call__(self, *args):
        return self.loss(*args) / self._divisor


class _Recorded(_StandIn):
    """Stands in for a loss in `recording_losses`."""

    def __init__(self, loss, record):
        super().__init__(loss)
        self._record = record

    def __call__(self, *args):
        return self._record(self.loss(*args))


class _Shown(_StandIn):
    """Stands in for a loss in `showing_values`."""

    def __init__(self, loss, record):
        super().__init__(loss)
        self._record = record

    def __call__(self, y_true, y_pred, sample_weight=None):
        loss, call = self.loss, self.loss.call

        def show(*args, **kwargs):
            values = call(*args, **kwargs)
            self._record(loss, y_true, y_pred, values)
            return values

        with attribute(loss, "call", show):
            return loss(y_true, y_pred, sample_weight)


class _Leaf:
    """Stands in for a loss in `map_compiled_losses`."""

    def __init__(self, loss, function):
        self._loss = loss
        self._function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        self._function(self._loss, y_true, y_pred, sample_weight)
        return tf.zeros(())
