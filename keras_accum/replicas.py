"""Several replicas: which strategies there are, and variables for each.

Between the boundaries of a window, a replica works on its own copies of all
variables. `reduction.py` has what happens at a boundary.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat

T = TypeVar("T")

TPU_STRATEGIES = (
    tf.distribute.TPUStrategy,
    tf.distribute.experimental.TPUStrategy,
)
STRATEGIES = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    *TPU_STRATEGIES,
)


def check_strategy() -> None:
    """Raises a `ValueError` unless the current strategy is supported."""
    names = (
        "none, `OneDeviceStrategy`, `MirroredStrategy`, "
        "`MultiWorkerMirroredStrategy` and `TPUStrategy`"
    )
    distribution = keras.distribution.distribution()
    if distribution is not None:
        raise ValueError(
            "Gradient accumulation does not work with a Keras `distribution`. "
            f"Received: {distribution}. The strategies of `tf.distribute` that "
            f"it works with are: {names}."
        )
    strategy = tf.distribute.get_strategy()
    if tf.distribute.has_strategy() and not isinstance(strategy, STRATEGIES):
        raise ValueError(
            "Gradient accumulation needs a strategy whose replicas hold copies "
            f"of all variables and work in step: {names}. "
            f"Received: {type(strategy).__name__}."
        )
    if has_several(strategy) and not compat.are_summed_on_read():
        raise ValueError(
            "Gradient accumulation on several replicas needs Keras 3.10 or "
            "newer: older ones report wrong metrics of them. Received: Keras "
            f"{keras.__version__}. Install keras>=3.10, or use one replica."
        )


def on_cpu(variable: tf.Variable) -> bool:
    """Returns whether a variable, or this replica's copy, is on a CPU."""
    return "CPU" in variable.device


@contextlib.contextmanager
def without_warning_of_slow_runs() -> Iterator[None]:
    """Keeps TensorFlow from warning of `strategy.run` without a `tf.function`.

    That is for what runs once: in each step it would be slow indeed.
    """
    logger = tf.get_logger()

    def is_other(record):
        return "eagerly has significant overhead" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def on_tpu(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether the replicas of a strategy are TPUs.

    XLA then compiles all that `strategy.run` is given, reductions included.
    """
    return isinstance(strategy, TPU_STRATEGIES)


def has_several(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether there is more than one replica."""
    return strategy.num_replicas_in_sync > 1


def has_copies(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether replicas have copies of variables, even if there is one.

    Such variables merge what replicas assign them, and within a replica none
    can be made.
    """
    return isinstance(strategy, STRATEGIES) and not isinstance(
        strategy, tf.distribute.OneDeviceStrategy
    )


def has_several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether other processes run the same program."""
    resolver = strategy.cluster_resolver
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and resolver is not None
        and len(resolver.cluster_spec().as_dict()) > 0
    )


def strategy_of(variables) -> tf.distribute.Strategy:
    """Returns the strategy in whose scope we are, or that made `variables`."""
    if tf.distribute.has_strategy():
        return tf.distribute.get_strategy()
    for variable in variables:
        value = getattr(variable, "value", variable)
        if isinstance(value, tf.distribute.DistributedValues):
            return value.distribute_strategy
    return tf.distribute.get_strategy()


# What a user's `tf.function` calls, AutoGraph converts, and warns of threads.
@tf.autograph.experimental.do_not_convert
def outside_of_tracing(make: Callable[[], T]) -> T:
    """Returns `make()`, called where no function is being traced.

    `tf.init_scope` leaves the graph, but neither the scope of a strategy nor
    the rule of `tf.function` that variables are made in its first call alone. A
    thread has scopes of its own.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(make).result()


def on_each(strategy: tf.distribute.Strategy, make: Callable[[], T]) -> T:
    """Returns `make()`; the variables that it makes are on each replica."""

    def make_in_scope():
        with strategy.scope():
            return make()

    return outside_of_tracing(make_in_scope)


def on_host(make: Callable[[], T]) -> T:
    """Returns `make()`; the variables that it makes are on the host's CPU."""

    def make_on_cpu():
        with tf.device("CPU:0"):
            return make()

    return outside_of_tracing(make_on_cpu)


def copies(
    strategy: tf.distribute.Strategy, variable: tf.Variable
) -> tuple[tf.Variable, ...]:
    """Returns the copies of a variable that this worker's replicas have.

    What the host does with these needs no replica: TensorFlow warns of a
    `strategy.run` that is not traced.
    """
    return strategy.experimental_local_results(variable)


class Snapshot:
    """The values of variables, to be restored.

    Args:
        strategy: The strategy that the variables were made under.
        variables: Any variables; of those on several replicas, each copy.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        variables: Sequence[tf.Variable],
    ) -> None:
        self._copies = [
            copy
            for variable in variables
            for copy in copies(strategy, variable)
        ]
        self._values = [copy.read_value() for copy in self._copies]

    def restore(self) -> None:
        """Assigns the values to the variables."""
        for copy, value in zip(self._copies, self._values, strict=True):
            copy.assign(value)


def sum_variable(initial: tf.Tensor, name: str) -> tf.Variable:
    """Makes a variable that each replica has; its value is their sum."""
    return tf.Variable(
        initial,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def same_variable(initial: tf.Tensor, name: str) -> tf.Variable:
    """Makes a variable that each replica has, of the same value on all.

    Nobody has to be asked for it.
    """
    return tf.Variable(
        initial,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def total(variable: tf.Variable) -> np.ndarray:
    """Returns a `sum_variable`'s value over all replicas, or another's."""
    return tf.convert_to_tensor(variable).numpy()


def assign_total(strategy, variable: tf.Variable, value) -> None:
    """Assigns a value to a `sum_variable`, all of it on the first replica."""
    value = tf.cast(value, variable.dtype)
    values = strategy.experimental_distribute_values_from_function(
        lambda replica: (
            tf.zeros_like(value) if replica.replica_id_in_sync_group else value
        )
    )
    for copy, share in zip(
        copies(strategy, variable),
        strategy.experimental_local_results(values),
        strict=True,
    ):
        copy.assign(share)


def placed(variable: tf.Variable, strategy: tf.distribute.Strategy):
    """Returns the replicas' values of a variable, along a new first axis.

    Within a replica, all but its own are zeros, to be summed over all.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        return tf.stack(copies(strategy, variable))
    num_replicas = strategy.num_replicas_in_sync
    places = tf.one_hot(
        context.replica_id_in_sync_group,
        num_replicas,
        True,
        False,
        dtype=tf.bool,
    )
    shape = [num_replicas] + [1] * variable.shape.rank
    value = tf.convert_to_tensor(variable)[None]
    return tf.where(tf.reshape(places, shape), value, tf.zeros_like(value))


def values_of_all(strategy: tf.distribute.Strategy, value: int) -> list[int]:
    """Returns the integers that all replicas have.

    All workers have to call it, in cross-replica context.
    """
    return [row[0] for row in lists_of_all(strategy, [value])]


def lists_of_all(
    strategy: tf.distribute.Strategy, values: Sequence[int]
) -> list[list[int]]:
    """Returns what all replicas have, as `values_of_all`: as many integers."""
    local = strategy.experimental_distribute_values_from_function(
        lambda replica: tf.constant([values], tf.int64)
    )
    return strategy.gather(local, axis=0).numpy().tolist()


def list_of_first(
    strategy: tf.distribute.Strategy, values: Sequence[int]
) -> list[int]:
    """Returns the integers that the first worker has.

    All workers have to call it, in cross-replica context.
    """
    count = values_of_all(strategy, len(values))[0]
    padded = [*values, *[0] * count][:count]
    return lists_of_all(strategy, padded)[0]


def first_local(strategy: tf.distribute.Strategy, data):
    """Returns what the first of this worker's replicas has of `data`."""
    return tf.nest.map_structure(
        lambda leaf: strategy.experimental_local_results(leaf)[0], data
    )


def least_of_all(strategy: tf.distribute.Strategy, value: int) -> int:
    """Returns the least of the workers' values; they all have to call it."""
    if not has_several_workers(strategy):
        return value
    return min(values_of_all(strategy, value))


def check_same_length(
    strategy: tf.distribute.Strategy, batches: int | None
) -> None:
    """Raises a `ValueError` unless all workers will make as many steps.

    Workers that made more would wait for the others for ever.

    Args:
        strategy: The strategy.
        batches: Batches in an epoch of this worker; None if it can't tell.
    """
    counts = values_of_all(strategy, -1 if batches is None else batches)
    if len(set(counts)) > 1:
        raise ValueError(
            "All workers must make the same number of steps in an epoch. "
            f"Received: {counts} batches, replica by replica (-1: not known). "
            "Give the same `steps_per_epoch` to all, and data that last."
        )
