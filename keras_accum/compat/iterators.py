"""The iterators over data that `fit` makes."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from tensorflow.python.data.experimental.ops import distribute as data_ops
from tensorflow.python.data.ops import rebatch_op
from tensorflow.python.distribute import input_lib

from keras_accum.compat.hooks import Hook
from keras_accum.compat.hooks import attribute

_new_iterators = Hook(input_lib, "_create_iterators_per_worker")
_begun_epochs = Hook(TFEpochIterator, "_get_iterator")


def first_batch(epoch_iterator):
    """Returns the first replica's rows of an epoch's first batch.

    Keras takes the mean over the replicas, which fails where their rows differ
    in shape, or are on several workers (keras#20585).
    """
    # The steps that come before it are one number or two, by the release.
    for *_, iterator in epoch_iterator:
        return keras.tree.map_structure(
            lambda value: (
                value.values[0]
                if isinstance(value, tf.distribute.DistributedValues)
                else value
            ),
            next(iterator),
        )
    return None


def iterating_over(function):
    """Passes distributed data of this thread's iterators through `function`.

    Args:
        function: Called with each worker's `tf.data.Dataset`; returns one.

    Returns:
        A context manager.
    """
    return _new_iterators.calling(
        lambda make, datasets, *args, **kwargs: make(
            [function(dataset) for dataset in datasets], *args, **kwargs
        )
    )


def recording_epoch_iterators(function):
    """Passes each epoch iterator that begins in this thread to `function`.

    Args:
        function: Called with what counts the steps of an epoch in Keras.

    Returns:
        A context manager.
    """

    def record(data_of, epoch_iterator):
        function(epoch_iterator)
        return data_of(epoch_iterator)

    return _begun_epochs.calling(record)


def end_epoch(epoch_iterator) -> list:
    """Takes the data from an epoch, which may be in its middle.

    Keras drops them before the next one. Until then the generator of the steps
    refers to the epoch iterator, which has the data.

    Returns:
        The data, to be dropped.
    """
    data = [epoch_iterator._current_iterator, epoch_iterator._epoch_iterator]
    epoch_iterator._current_iterator = None
    epoch_iterator._epoch_iterator = None
    return data


def number_of_batches(iterator) -> int:
    """Returns how many batches a distributed iterator has here, in all.

    Returns:
        A negative number where that is not known, or there is no end.
    """
    return min(
        _number_of_steps(local._dataset, iterator._cardinality)
        for local in iterator._iterators
    )


def record_number_of_batches(epoch_iterator) -> None:
    """Records in a distributed dataset the length that Keras knows.

    Keras makes a dataset from arrays in a way that hides it.
    """
    dataset, num_batches = (
        epoch_iterator._distributed_dataset,
        epoch_iterator.num_batches,
    )
    is_unknown = dataset.cardinality == tf.data.UNKNOWN_CARDINALITY
    if num_batches is not None and is_unknown:
        dataset._cardinality = num_batches


def _number_of_steps(dataset, source_length):
    """Returns the length of a worker's dataset before its split into shares.

    TensorFlow does not know how many shares there are. If each worker has its
    share of each batch, if need be an empty one, there is a step per batch.
    """
    policy = dataset.options().experimental_distribute.auto_shard_policy
    split_classes = (rebatch_op._RebatchDataset, data_ops._LegacyRebatchDataset)
    source = dataset
    while policy == tf.data.experimental.AutoShardPolicy.DATA:
        inputs = source._inputs()
        if len(inputs) != 1:
            break
        if isinstance(source, split_classes):
            return int(source_length)
        source = inputs[0]
    return int(dataset.cardinality())


@contextlib.contextmanager
def asking_no_other_workers() -> Iterator[None]:
    """Ends distributed iterators when the data end on this worker.

    Otherwise they ask all workers at every step whether anyone has a batch
    left.
    """

    def count_here(strategy, input_workers, optionals):
        del strategy, input_workers
        has_value = [each.has_value() for each in tf.nest.flatten(optionals)]
        return tf.math.count_nonzero(tf.stack(has_value))

    with attribute(input_lib, "_calculate_replicas_with_values", count_here):
        yield
