"""Several replicas: which strategies, variables for each, one reduction.

Between the boundaries of a window, a replica works on its own copies of all
variables. At a boundary every replica packs what it gathered into one vector,
the vectors are summed in one reduction, and each takes the sum apart again.
"""

import concurrent.futures
from collections.abc import Callable
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


def on_cpu(variable: tf.Variable) -> bool:
    """Whether a variable, or within a replica its own copy, is on a CPU."""
    return "CPU" in variable.device


def on_tpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas of a strategy are TPUs.

    XLA then compiles all that `strategy.run` is given, reductions included.
    """
    return isinstance(strategy, TPU_STRATEGIES)


def has_several(strategy: tf.distribute.Strategy) -> bool:
    """Whether there is anyone to talk to."""
    return strategy.num_replicas_in_sync > 1


def has_copies(strategy: tf.distribute.Strategy) -> bool:
    """Whether a replica has copies of variables, even if it is the only one.

    Such variables merge what replicas assign them, and within a replica none
    can be made.
    """
    return isinstance(strategy, STRATEGIES) and not isinstance(
        strategy, tf.distribute.OneDeviceStrategy
    )


def has_several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes run the same program."""
    resolver = strategy.cluster_resolver
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and resolver is not None
        and len(resolver.cluster_spec().as_dict()) > 0
    )


def strategy_of(variables) -> tf.distribute.Strategy:
    """The strategy in whose scope we are, or that made `variables`."""
    if tf.distribute.has_strategy():
        return tf.distribute.get_strategy()
    for variable in variables:
        value = getattr(variable, "value", variable)
        if isinstance(value, tf.distribute.DistributedValues):
            return value.distribute_strategy
    return tf.distribute.get_strategy()


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
    """The copies of a variable that this worker's replicas have.

    What the host does with these needs no replica: TensorFlow warns of a
    `strategy.run` that is not traced.
    """
    return strategy.experimental_local_results(variable)


class Snapshot:
    """What variables held, to be restored.

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
        """Assigns what the variables held."""
        for copy, value in zip(self._copies, self._values, strict=True):
            copy.assign(value)


def sum_variable(initial: tf.Tensor, name: str) -> tf.Variable:
    """A variable of which each replica has its own; the value is their sum."""
    return tf.Variable(
        initial,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def total(variable: tf.Variable) -> np.ndarray:
    """The value of a `sum_variable` over all replicas, or of another one."""
    return tf.convert_to_tensor(variable).numpy()


def assign_total(strategy, variable: tf.Variable, value) -> None:
    """Gives a `sum_variable` a value, all of it on the first replica."""
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
    """A variable's value on each replica, along a new first axis, to be summed.

    Within a replica, all but its own are zeros.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        return tf.stack(copies(strategy, variable))
    number = strategy.num_replicas_in_sync
    places = tf.one_hot(
        context.replica_id_in_sync_group, number, True, False, dtype=tf.bool
    )
    shape = [number] + [1] * variable.shape.rank
    value = tf.convert_to_tensor(variable)[None]
    return tf.where(tf.reshape(places, shape), value, tf.zeros_like(value))


def pack(values) -> tf.Tensor:
    """One vector of all floats in a nested structure, to be reduced at once.

    The reduction costs 4 bytes an entry, or 8 if anything is float64.
    """
    flat = [tf.convert_to_tensor(value) for value in tf.nest.flatten(values)]
    wide = any(value.dtype == tf.float64 for value in flat)
    dtype = tf.float64 if wide else tf.float32
    return tf.concat(
        [tf.reshape(tf.cast(value, dtype), [-1]) for value in flat], axis=0
    )


def unpack(vector: tf.Tensor, like):
    """Takes a sum of `pack(like)` apart: tensors in the structure `like`."""
    flat = tf.nest.flatten(like)
    parts = tf.split(vector, [value.shape.num_elements() for value in flat])
    return tf.nest.pack_sequence_as(
        like,
        [
            tf.cast(tf.reshape(part, value.shape), value.dtype)
            for part, value in zip(parts, flat, strict=True)
        ],
    )


def reduce_across(strategy, vector, destination: tf.Variable):
    """Sums over all replicas, in one reduction, in cross-replica context.

    Args:
        strategy: The strategy.
        vector: One vector per replica, from `strategy.run`.
        destination: A variable that is where the sum is wanted: on each
            replica. Within a branch of a `tf.cond`, tensors do not know where
            they are.
    """
    return compat.sum_to(strategy, vector, destination)


def sum_over_replicas(values, destination: tf.Variable):
    """`values` of all replicas added up, in replica context.

    Args:
        values: A nested structure of float tensors or variables.
        destination: As for `reduce_across`.
    """
    if not has_several(tf.distribute.get_strategy()):
        return tf.nest.map_structure(tf.convert_to_tensor, values)
    context = tf.distribute.get_replica_context()
    vector = pack(values)
    if on_tpu(context.strategy):
        vector = context.all_reduce(tf.distribute.ReduceOp.SUM, vector)
    else:
        vector = context.merge_call(reduce_across, args=(vector, destination))
    return unpack(vector, values)


def numbers_of_all(strategy: tf.distribute.Strategy, number: int) -> list[int]:
    """The numbers that all replicas have.

    All workers have to ask, in cross-replica context.
    """
    own = strategy.experimental_distribute_values_from_function(
        lambda replica: tf.constant([number], tf.int64)
    )
    return strategy.gather(own, axis=0).numpy().tolist()


def number_of_rows(strategy: tf.distribute.Strategy, data) -> tf.Tensor:
    """Rows of a batch on all replicas, if all workers have as many as this.

    Args:
        strategy: The strategy.
        data: Nested tensors, one per replica where there are several.
    """
    parts = local_rows(strategy, data)
    workers = strategy.num_replicas_in_sync // len(parts)
    return workers * tf.add_n(parts)


def number_of_parts(
    strategy: tf.distribute.Strategy, data, size: int
) -> tf.Tensor | None:
    """Into how many parts of `size` rows the replicas' batches can be cut.

    All replicas of this worker then take as many steps, so that the state of
    their random generators stays the same.

    Args:
        strategy: The strategy.
        data: As for `number_of_rows`.
        size: Most rows of a part.

    Returns:
        An integer scalar, or None if there is one replica.
    """
    if not has_several(strategy):
        return None
    return -(-tf.reduce_max(tf.stack(local_rows(strategy, data))) // size)


def first_part(strategy: tf.distribute.Strategy, data):
    """What the first of this worker's replicas gets of a batch."""
    return tf.nest.map_structure(
        lambda leaf: strategy.experimental_local_results(leaf)[0], data
    )


def local_rows(strategy, data):
    """Rows of a batch on each replica of this worker."""
    leaf = next(leaf for leaf in tf.nest.flatten(data) if leaf is not None)
    parts = strategy.experimental_local_results(leaf)
    return [tf.shape(part)[0] for part in parts]


def least_of_all(strategy: tf.distribute.Strategy, number: int) -> int:
    """The least of the workers' numbers; they all have to ask."""
    if not has_several_workers(strategy):
        return number
    return min(numbers_of_all(strategy, number))


def check_same_length(
    strategy: tf.distribute.Strategy, batches: int | None
) -> None:
    """Raises a `ValueError` unless all workers will make as many steps.

    Those that made more would wait for the others for ever.

    Args:
        strategy: The strategy.
        batches: Batches in an epoch of this worker; None if it can't tell.
    """
    numbers = numbers_of_all(strategy, -1 if batches is None else batches)
    if len(set(numbers)) > 1:
        raise ValueError(
            "All workers must make the same number of steps in an epoch. "
            f"Received: {numbers} batches, replica by replica (-1: not known). "
            "Give the same `steps_per_epoch` to all, and data that last."
        )
