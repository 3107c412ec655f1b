"""The replicas of a strategy, and what they tell each other."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import reduce_per_replica

from keras_accum.compat.hooks import attribute


def concatenate_outputs(outputs, strategy):
    """The outputs of all replicas, one after the other."""
    return reduce_per_replica(outputs, strategy, reduction="concat")


def own_copy(variable):
    """Within a replica, its own copy of a `tf.Variable`."""
    if isinstance(variable, tf.distribute.DistributedValues):
        return variable._get_on_device_or_primary()
    return variable


def sum_to(strategy, values, destination):
    """Sums over all replicas, in cross-replica context.

    `ReplicaContext.all_reduce` is for within a replica, and `Strategy.reduce`
    leaves the sum on one device.

    Args:
        strategy: The strategy.
        values: One tensor per replica.
        destination: A variable that is where the sum is wanted.
    """
    (total,) = strategy.extended.batch_reduce_to(
        tf.distribute.ReduceOp.SUM, [(values, destination)]
    )
    return total


@contextlib.contextmanager
def without_communication(optimizer, is_tpu) -> Iterator[None]:
    """Lets an optimizer update each replica's copies from what it is given.

    All replicas must give it the same gradients. By itself it would sum them
    over the replicas, after it has clipped them, and leave the replicas'
    programs for that, where XLA cannot follow.

    Args:
        optimizer: The optimizer of a model.
        is_tpu: Whether `merge_call` is known to XLA, as it is on TPUs alone.
    """
    extended = tf.distribute.get_strategy().extended
    parts = [optimizer, getattr(optimizer, "inner_optimizer", None)]
    parts += getattr(optimizer, "optimizers", [])
    with contextlib.ExitStack() as stack:
        for part in parts:
            if part is not None:
                stack.enter_context(
                    attribute(
                        part, "_all_reduce_sum_gradients", lambda pairs: pairs
                    )
                )
        if not is_tpu:
            # As TensorFlow's own tests do it: each replica then runs what it
            # would have left to `merge_call`, on its own copies.
            stack.enter_context(
                attribute(extended, "_use_merge_call", lambda: False)
            )
            for part in parts:
                for variable in getattr(part, "variables", []):
                    # The number of updates would be sent by the first replica.
                    stack.enter_context(
                        attribute(
                            variable.value,
                            "_aggregation",
                            tf.VariableAggregation.NONE,
                        )
                    )
        yield
