"""What `fit` calls of a model, and of its optimizer."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.trainers.trainer import Trainer
from keras.src.utils.tracking import DotNotTrackScope

from keras_accum.compat.hooks import Hook
from keras_accum.compat.hooks import attribute

# Where `BackupAndRestore` tells `fit` with which epoch to begin.
FIRST_EPOCH = "_initial_epoch"

# What updates anything ends in one of these.
_updates = [
    Hook(cls, "apply")
    for cls in (keras.Optimizer, keras.optimizers.LossScaleOptimizer)
]
_steps = {
    name: Hook(TensorFlowTrainer, name) for name in ("train_step", "test_step")
}


def compute_loss(model, x, y, y_pred, sample_weight, training):
    """Calls `model.compute_loss`.

    An override may lack the argument `training`, as Keras 3.2 had it.
    """
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def iterations(optimizer) -> keras.Variable:
    """Returns how many updates an optimizer has made.

    Until Keras 3.9 one that scales the loss has a number of its own, which
    stays 0.
    """
    return getattr(optimizer, "inner_optimizer", optimizer).iterations


def aggregate_loss(model, loss):
    """Returns an added loss as it counts in `compute_loss`; a scalar."""
    return model._aggregate_additional_loss(loss)


def has_custom_compute_loss(model) -> bool:
    """Returns whether a class replaces Keras's own `compute_loss`."""
    return type(model).compute_loss is not Trainer.compute_loss


def has_custom_step(model, mixin, name) -> bool:
    """Returns whether a class behind `mixin` replaces Keras's own step.

    Args:
        model: The model.
        mixin: One of its classes, which has a step of that name.
        name: "train_step" or "test_step".
    """
    behind = getattr(super(mixin, model), name)
    return behind.__func__ is not getattr(TensorFlowTrainer, name)


def instead_of_keras(model, name, function):
    """Calls `function(data)` where a model comes to Keras's own step.

    What a class behind our mixin calls by `super()` is then as if ours were the
    class that it is derived from.

    Args:
        model: The model.
        name: "train_step" or "test_step".
        function: What stands in.

    Returns:
        A context manager, for this thread.
    """

    def step(method, instance, *args, **kwargs):
        if instance is not model:
            return method(instance, *args, **kwargs)
        return function(*args, **kwargs)

    return _steps[name].calling(step)


def takes_training_argument(model) -> bool:
    """Returns whether `model.call` has an argument `training`."""
    return model._call_has_training_arg


def loss_tracker(model):
    """Returns the metric behind the "loss" of `fit`; None if not compiled."""
    return getattr(model, "_loss_tracker", None)


def set_loss_tracker(model, metric) -> None:
    """Replaces the metric behind the "loss" that `fit` reports."""
    # Tracked, it would be listed in `model.metrics` a second time.
    with DotNotTrackScope():
        model._loss_tracker = metric


@contextlib.contextmanager
def running_eagerly(model) -> Iterator[None]:
    """Has a model run eagerly, and not be compiled by XLA."""
    with (
        attribute(model, "_run_eagerly", True),
        attribute(model, "_jit_compile", False),
    ):
        yield


def optionals_to_none(model, function):
    """Wraps `function(data)`: empty `tf.experimental.Optional`s become None.

    Keras's data adapters say "no sample weights" in that way, from 3.12 on.
    """
    convert = getattr(model, "_autoconvert_optionals", None)
    return function if convert is None else convert(function)


def has_local_strategy(model) -> bool:
    """Returns whether a model was made in the scope of a strategy."""
    return model._distribute_strategy is not None


class SymbolicBuildMixin:
    """A model of a strategy that makes its variables in a way of its own.

    Keras asks for that before `fit` and `evaluate` begin, and calls
    `_build_from` with an iterator over an epoch, or with a batch.
    """

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if has_local_strategy(self):
            self._build_from(iterator, data_batch)


def build_by(model, x) -> None:
    """Makes a model's variables for inputs, without running it if it can."""
    if any(isinstance(leaf, tf.RaggedTensor) for leaf in keras.tree.flatten(x)):
        # A symbolic tensor of Keras has not the methods of a ragged one.
        training = {"training": False} if takes_training_argument(model) else {}
        model(x, **training)
        return
    inputs = keras.tree.map_structure(
        lambda leaf: keras.KerasTensor(
            leaf.shape, backend.standardize_dtype(leaf.dtype)
        ),
        x,
    )
    backend.compute_output_spec(model, inputs, training=False)


def symbolic_build(model, data_batch) -> None:
    """Makes all variables that a batch needs, without running it.

    A model without a `call`, such as a GAN, has made them by itself.
    """
    if has_call(model):
        model._symbolic_build(data_batch=data_batch)


def has_call(model) -> bool:
    """Returns whether a model has a `call`, which makes its variables."""
    return type(model).call is not keras.Model.call


def ending_training_by(optimizer, function):
    """Calls `function` where Keras ends a `fit`, within the context.

    Args:
        optimizer: The optimizer, which then takes averages for the weights, if
            it has any.
        function: Called as `function(end, *args)`, where `end(*args)` does
            what Keras would.

    Returns:
        A context manager.
    """
    name = "finalize_variable_values"
    end = getattr(optimizer, name)
    return attribute(
        optimizer, name, lambda *args, **kwargs: function(end, *args, **kwargs)
    )


@contextlib.contextmanager
def before_updates(function) -> Iterator[None]:
    """Calls `function` before each update of an optimizer, in this thread.

    Args:
        function: Called as `function(optimizer, variables)`.
    """

    def update(apply, optimizer, *args, **kwargs):
        arguments = dict(
            zip(("grads", "trainable_variables"), args, strict=False)
        )
        variables = (arguments | kwargs).get("trainable_variables")
        if variables is None:
            # Not there before the optimizer is built, and then Keras raises.
            variables = getattr(optimizer, "_trainable_variables", [])
        function(optimizer, variables)
        return apply(optimizer, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for hook in _updates:
            stack.enter_context(hook.calling(update))
        yield
