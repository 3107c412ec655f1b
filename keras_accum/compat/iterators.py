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
    """The first replica's part of an epoch's first batch.

    Keras takes the mean over the replicas, which fails where the parts differ
    in their shapes, or are on several workers (keras#20585).
    """
    for _, _, iterator in epoch_iterator:
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
    """Has a function say what distributed data this thread iterates over.

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


def noting_epoch_iterators(function):
    """Has a function see each epoch iterator that begins in this thread.

    Args:
        function: Called with what Keras counts the steps of an epoch with.

    Returns:
        A context manager.
    """

    def note(data_of, epoch_iterator):
        function(epoch_iterator)
        return data_of(epoch_iterator)

    return _begun_epochs.calling(note)


def end_epoch(epoch_iterator) -> None:
    """Lets go of the data of an epoch, which may be in its middle.

    Keras does the same before the next one. The generator of the steps refers
    to what has it.
    """
    epoch_iterator._current_iterator = None
    epoch_iterator._epoch_iterator = None


def number_of_batches(iterator) -> int:
    """How many batches a distributed iterator has for this worker in all.

    Returns:
        A negative number where that is not known, or there is no end.
    """
    return min(
        _number_of_steps(part._dataset, iterator._cardinality)
        for part in iterator._iterators
    )


def note_number_of_batches(epoch_iterator) -> None:
    """Tells a distributed dataset what Keras knows of its length.

    Keras makes the dataset of arrays in a way that hides it.
    """
    dataset, number = (
        epoch_iterator._distributed_dataset,
        epoch_iterator.num_batches,
    )
    is_unknown = dataset.cardinality == tf.data.UNKNOWN_CARDINALITY
    if number is not None and is_unknown:
        dataset._cardinality = number


def _number_of_steps(dataset, uncut_length):
    """The length of a worker's dataset before it was cut into shares.

    TensorFlow does not know how many shares there are. If each worker has its
    share of each batch, if need be an empty one, there is a step per batch.
    """
    policy = dataset.options().experimental_distribute.auto_shard_policy
    is_cut = (rebatch_op._RebatchDataset, data_ops._LegacyRebatchDataset)
    uncut = dataset
    while policy == tf.data.experimental.AutoShardPolicy.DATA:
        inputs = uncut._inputs()
        if len(inputs) != 1:
            break
        if isinstance(uncut, is_cut):
            return int(uncut_length)
        uncut = inputs[0]
    return int(dataset.cardinality())


@contextlib.contextmanager
def asking_no_other_workers() -> Iterator[None]:
    """Lets distributed iterators end when the data end on this worker.

    By themselves they ask all workers at every step whether anyone has a batch
    left.
    """

    def count_here(strategy, input_workers, optionals):
        del strategy, input_workers
        has_value = [each.has_value() for each in tf.nest.flatten(optionals)]
        return tf.math.count_nonzero(tf.stack(has_value))

    with attribute(input_lib, "_calculate_replicas_with_values", count_here):
        yield
