"""Variables that are made before they are needed."""

import contextlib

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas


def build_optimizer(optimizer: keras.Optimizer, variables) -> None:
    """Makes an optimizer's variables, unless they exist, as Keras does."""
    if optimizer.built:
        return
    # Its inner ones name their variables by themselves.
    has_no_scope = getattr(keras.optimizers, "MultiOptimizer", ())
    if isinstance(optimizer, has_no_scope):
        optimizer.build(variables)
    else:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(variables)


def build_optimizer_early(
    strategy: tf.distribute.Strategy, optimizer: keras.Optimizer, variables
) -> None:
    """Makes an optimizer's variables before the update, if that is too late.

    TensorFlow traces twice what makes variables, as the update would do in
    Keras. Without its variables a `LossScaleOptimizer` scales by a constant,
    which would be traced as such, and a replica can make none. Where nothing is
    traced, Keras builds all others at the first update.

    Args:
        strategy: The model's strategy.
        optimizer: The optimizer.
        variables: What it will update; Keras's.
    """
    is_traced = tf.inside_function()
    is_late = (
        is_traced
        or replicas.has_copies(strategy)
        or isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    )
    if not is_late or optimizer.built:
        return

    def build():
        with contextlib.ExitStack() as stack:
            if is_traced:
                # Where Keras builds it in a trace, what `build` assigns is
                # lost, as ScheduleFreeAdamW's copies of the weights.
                stack.enter_context(compat.optimizers_assigning_nothing())
            build_optimizer(optimizer, variables)

    replicas.on_each(strategy, build)


def build_from(model: keras.Model, iterator, data_batch) -> None:
    """Makes a model's variables before an epoch, without a reduction.

    Keras does the same with one.

    Args:
        model: The model.
        iterator: Keras's iterator over an epoch, or None.
        data_batch: A batch, if there is no iterator.
    """
    strategy = model.distribute_strategy
    if iterator is not None:
        if replicas.has_several_workers(strategy):
            replicas.check_same_length(strategy, iterator.num_batches)
            compat.record_number_of_batches(iterator)
        data_batch = compat.first_batch(iterator)
    with strategy.scope():
        compat.symbolic_build(model, data_batch)
