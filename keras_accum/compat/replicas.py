"""The replicas of a strategy, and what they tell each other."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from tensorflow.python.ops import collective_ops

from keras_accum.compat.hooks import attribute


def concatenate_outputs(outputs, strategy):
    """Returns the outputs of all replicas, one after the other."""
    return reduce_per_replica(outputs, strategy, reduction="concat")


def local_variable(variable):
    """Returns the copy of a `tf.Variable` that belongs to this replica."""
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


def gather_to(strategy, values, destination):
    """Returns the vectors of all replicas, one after the other.

    `Strategy.gather` leaves them on one device, and `ReplicaContext.all_gather`
    needs tensors that know where they are: within a branch of a `tf.cond` they
    do not.

    Args:
        strategy: The strategy.
        values: One vector per replica, in cross-replica context.
        destination: A variable that is where they are wanted.
    """
    return strategy.extended._gather_to(values, destination, axis=0)


def exchange(strategy, values):
    """Returns on each replica what all of them have for it.

    `tf.distribute` has no such reduction, but TensorFlow's kernel has.

    Args:
        strategy: A `MultiWorkerMirroredStrategy`.
        values: One matrix per replica, in cross-replica context: row `i` is for
            replica `i`.

    Returns:
        One matrix per replica: row `i` is from replica `i`.
    """
    launchers = strategy.extended._get_cross_device_ops(values)._launchers
    local = strategy.experimental_local_results(values)
    exchanged = map(_exchange_on, launchers, local)
    # It asks for this worker's replicas alone, in their order.
    return strategy.experimental_distribute_values_from_function(
        lambda context: next(exchanged)
    )


def _exchange_on(launcher, value):
    options = launcher._options
    with tf.device(launcher._device):
        return collective_ops.all_to_all_v2(
            value,
            launcher._group_size,
            launcher._group_key,
            launcher._next_instance_key(),
            communication_hint=options.implementation.value,
            timeout=options.timeout_seconds or 0,
            ordering_token=launcher._get_ordering_token(),
        )


@contextlib.contextmanager
def without_communication(optimizer, is_tpu) -> Iterator[None]:
    """Makes an optimizer update each replica's copies from what it is given.

    All replicas must give it the same gradients. Otherwise it would clip them,
    then sum them over the replicas, and leave the replicas' programs for that,
    where XLA cannot follow.

    Args:
        optimizer: The optimizer of a model.
        is_tpu: Whether `merge_call` is known to XLA, as it is on TPUs alone.
    """
    extended = tf.distribute.get_strategy().extended
    optimizers = [optimizer, getattr(optimizer, "inner_optimizer", None)]
    optimizers += getattr(optimizer, "optimizers", [])
    with contextlib.ExitStack() as stack:
        for each in optimizers:
            if each is not None:
                stack.enter_context(
                    attribute(
                        each, "_all_reduce_sum_gradients", lambda pairs: pairs
                    )
                )
        if not is_tpu:
            # As TensorFlow's own tests do it: each replica then runs what it
            # would have left to `merge_call`, on its own copies.
            stack.enter_context(
                attribute(extended, "_use_merge_call", lambda: False)
            )
            for each in optimizers:
                for variable in getattr(each, "variables", []):
                    # The number of updates would be sent by the first replica.
                    stack.enter_context(
                        attribute(
                            variable.value,
                            "_aggregation",
                            tf.VariableAggregation.NONE,
                        )
                    )
        yield
