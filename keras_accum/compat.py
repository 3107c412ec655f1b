"""Every private Keras name that is used, each in one small function.

What is needed here has no public name. `tests/compat_test.py` fails with a
clear message when one of them is gone from a Keras release.
"""

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from keras.src.losses import loss as loss_module
from keras.src.models.functional import Functional
from keras.src.utils import python_utils
from keras.src.utils.tracking import DotNotTrackScope


def functional_class() -> type[keras.Model]:
    """The class of models that are built from inputs and outputs.

    `keras.Model(inputs, outputs)` returns one; it has no public name.
    """
    return Functional


def compute_loss(model, x, y, y_pred, sample_weight):
    """`model.compute_loss` for training.

    Calls overrides that lack the argument `training`, as Keras 3.2 had it.
    """
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
    )


def has_custom_train_step(model, mixin) -> bool:
    """Whether a class behind `mixin` replaces Keras's own `train_step`."""
    behind = super(mixin, model).train_step
    return behind.__func__ is not TensorFlowTrainer.train_step


def takes_training_argument(model) -> bool:
    """Whether `model.call` has an argument `training`."""
    return model._call_has_training_arg


def loss_tracker(model):
    """The metric behind the "loss" that `fit` reports; None if uncompiled."""
    return getattr(model, "_loss_tracker", None)


def set_loss_tracker(model, metric) -> None:
    """Replaces the metric behind the "loss" that `fit` reports."""
    # Tracked, it would be listed in `model.metrics` a second time.
    with DotNotTrackScope():
        model._loss_tracker = metric


def unscale_loss(loss):
    """Undoes the division of the loss by the number of replicas."""
    return loss_module.unscale_loss_for_distribution(loss)


def optionals_to_none(model, function):
    """Wraps `function(data)`: empty `tf.experimental.Optional`s become None.

    Keras's data adapters say "no sample weights" in that way.
    """
    return model._autoconvert_optionals(function)


def reduce_logs(logs, strategy):
    """One value per log from the values of all replicas."""
    return reduce_per_replica(logs, strategy, reduction="auto")


def keras_mask(tensor):
    """The mask that a layer attached to its output, or None."""
    return backend.get_keras_mask(tensor)


def merge_mask(sample_weight, mask, dtype, reduction):
    """The weights of a loss's entries, as `keras.Loss` merges them."""
    return loss_module.apply_mask(
        sample_weight, mask, dtype=dtype, reduction=reduction
    )


def align_ranks(values, weight):
    """`values` and `weight` with the ranks at which `keras.Loss` multiplies."""
    return loss_module.squeeze_or_expand_to_same_rank(values, weight)


def compiled_loss(model):
    """The object that computes the losses given to `compile`, or None.

    It pairs each loss with its output, label and sample weight.
    """
    return getattr(model, "_compile_loss", None)


def own_losses(model) -> list[tf.Tensor]:
    """What layers added by `add_loss` and activity regularizers."""
    losses = list(model._get_own_losses())
    for layer in model._flatten_layers(include_self=False):
        losses.extend(layer._get_own_losses())
    return losses


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
        entry._replace(loss=_Leaf(entry.loss, function), loss_weights=None)
        for entry in compiled._flat_losses
    ]
    walker._metrics = [None] * len(walker._flat_losses)
    walker(y, y_pred, sample_weight)


def build_compiled_losses(compiled, y, y_pred, sample_weight) -> None:
    """Lets `compiled` meet its first batch, and make its metrics, unrun."""

    def symbolic(leaf):
        if leaf is None:
            return None
        return keras.KerasTensor(
            leaf.shape, backend.standardize_dtype(leaf.dtype)
        )

    batch = keras.tree.map_structure(symbolic, (y, y_pred, sample_weight))
    backend.compute_output_spec(compiled, *batch)


def output_metrics(compiled) -> list[keras.Metric]:
    """The metrics behind the losses of single outputs; none if there is one."""
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
    """Whether `compiled` has met its first batch."""
    return bool(compiled.built)


def keeps_automatic_config(get_config):
    """Marks an override of `get_config` that only adds to Keras's.

    Keras writes the configuration of a subclass from the arguments of its
    constructor, unless the subclass has a `get_config` without this mark.
    """
    return python_utils.default(get_config)


class _Leaf:
    """Stands in for a loss in `map_compiled_losses`."""

    def __init__(self, loss, function):
        self._loss = loss
        self._function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        self._function(self._loss, y_true, y_pred, sample_weight)
        return tf.zeros(())
