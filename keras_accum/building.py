"""Variables that are made before they are needed."""

import keras

from keras_accum import compat
from keras_accum import replicas


def build_optimizer(optimizer: keras.Optimizer, variables) -> None:
    """Makes an optimizer's variables, unless they exist, as Keras does."""
    if not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(variables)


def build_optimizer_early(model: keras.Model, is_needed: bool) -> None:
    """Makes the optimizer's variables where the update would be too late.

    Without its variables a `LossScaleOptimizer` scales by a constant, which
    would be traced as such, and no variables are made within replicas. All
    others are left for Keras to build at the first update.

    Args:
        model: The model.
        is_needed: Whether something else needs them before the update.
    """
    optimizer, strategy = model.optimizer, model.distribute_strategy
    is_late = (
        is_needed
        or replicas.has_copies(strategy)
        or isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    )
    if is_late and not optimizer.built:
        replicas.on_each(
            strategy,
            lambda: build_optimizer(optimizer, model.trainable_weights),
        )


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
