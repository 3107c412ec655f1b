"""The rows of a batch: how many there are, and taking some of them.

A batch is nested tensors, dense, sparse or ragged, with rows along the first
axis; None stays None.
"""

import keras
import tensorflow as tf

from keras_accum import replicas


def number_of_rows(*batch) -> tf.Tensor:
    """Returns the rows of a batch; an int32 scalar.

    Args:
        *batch: Nested tensors, those first that tell for certain. The first
            tensor with a first axis is looked at.
    """
    return count_of(next(filter(has_first_axis, keras.tree.flatten(batch))))


def by_certainty(data) -> tuple:
    """Returns the parts of a batch, those first that tell its rows for certain.

    The tensors of `x` may be of anything: a graph has nodes, and edges.

    Args:
        data: A batch as `fit` gets it, or in any other form.
    """
    try:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    except ValueError:
        return (data,)
    return sample_weight, y, x


def has_rows(data) -> tf.Tensor | None:
    """Returns whether a batch has rows; None if it does for certain."""
    found = count(data)
    if found is None:
        return None
    static_count = tf.get_static_value(found)
    return None if static_count is not None and static_count > 0 else found > 0


def count(data) -> tf.Tensor | None:
    """Returns the rows of a batch, an int32 scalar; None if none can be told.

    Args:
        data: As for `by_certainty`.
    """
    leaves = filter(has_first_axis, keras.tree.flatten(by_certainty(data)))
    leaf = next(leaves, None)
    return None if leaf is None else count_of(leaf)


def common_count(data) -> tf.Tensor | None:
    """Returns the rows that all tensors of a batch have; an int32 scalar.

    It is -1 if they differ, and None if there are none with a first axis.
    """
    leaves = list(filter(has_first_axis, tf.nest.flatten(data)))
    if not leaves:
        return None
    counts = tf.stack(list(map(count_of, leaves)))
    return tf.where(tf.reduce_all(counts == counts[0]), counts[0], -1)


def has_first_axis(leaf) -> bool:
    """Returns whether a leaf of a batch has a first axis."""
    shape = getattr(leaf, "shape", None)
    return shape is not None and len(shape) > 0


def local_counts(strategy: tf.distribute.Strategy, data) -> list[tf.Tensor]:
    """Returns the rows of a batch on each replica of this worker."""
    leaves = tf.nest.flatten(by_certainty(data))
    local = [
        strategy.experimental_local_results(leaf)
        for leaf in leaves
        if leaf is not None
    ]
    return [number_of_rows(each) for each in zip(*local, strict=True)]


def total_count(strategy: tf.distribute.Strategy, data) -> tf.Tensor:
    """Returns the rows on all replicas, if all workers have as many as this.

    Args:
        strategy: The strategy.
        data: A batch; one per replica where there are several.
    """
    counts = local_counts(strategy, data)
    num_workers = strategy.num_replicas_in_sync // len(counts)
    return num_workers * tf.add_n(counts)


def num_microbatches(
    strategy: tf.distribute.Strategy, data, size: int
) -> tf.Tensor | None:
    """Returns how many micro-batches the fullest replica's rows make.

    All replicas of this worker then take as many steps, so that the state of
    their random generators stays the same.

    Args:
        strategy: The strategy.
        data: A batch; one per replica where there are several.
        size: Most rows of a micro-batch.

    Returns:
        An integer scalar, or None if there is one replica.
    """
    if not replicas.has_several(strategy):
        return None
    return -(-tf.reduce_max(tf.stack(local_counts(strategy, data))) // size)


def check_count(data) -> int | tf.Tensor:
    """Returns the number of rows that all leaves have.

    Raises:
        ValueError: If a leaf has no first axis, or they differ in its length.
    """
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    if any(leaf.shape.rank == 0 for leaf in leaves):
        raise ValueError(mismatch(leaves))
    static_counts = {leaf.shape[0] for leaf in leaves} - {None}
    if len(static_counts) > 1:
        raise ValueError(mismatch(leaves))
    if static_counts:
        return static_counts.pop()
    counts = [count_of(leaf) for leaf in leaves]
    message = mismatch(leaves)
    checks = [
        tf.debugging.assert_equal(count, counts[0], message)
        for count in counts[1:]
    ]
    with tf.control_dependencies(checks):
        return tf.identity(counts[0])


def mismatch(leaves) -> str:
    """Returns the error message for leaves that have not the same rows."""
    shapes = ", ".join(str(leaf.shape) for leaf in leaves)
    return (
        "With `microbatch_size`, a batch is cut along the first axis, which "
        "must be that of the rows in all of its tensors. "
        f"Received: shapes {shapes}. Give each row its own copy of what has no "
        "such axis, or use `accum_steps`."
    )


def count_of(leaf) -> tf.Tensor:
    """Returns the length of a leaf's first axis; an int32 scalar."""
    if isinstance(leaf, tf.RaggedTensor):
        return tf.cast(leaf.nrows(), tf.int32)
    if isinstance(leaf, tf.SparseTensor):
        return tf.cast(leaf.dense_shape[0], tf.int32)
    return tf.shape(leaf)[0]


def take_first(data, size: int | None):
    """Returns at most `size` rows from the first on; all if it is None."""
    if size is None:
        return data
    count = check_count(data)
    if not isinstance(count, int):
        return take(data, 0, tf.minimum(size, count))
    return take(data, 0, size, size) if count > size else data


def take(data, start, stop, size: int | None = None):
    """Returns the rows from `start` to `stop` of all leaves.

    Args:
        data: A batch.
        start: The first row.
        stop: The row after the last.
        size: How many these are, if that is known.
    """

    def take_from(leaf):
        if leaf is None:
            return None
        if isinstance(leaf, tf.SparseTensor):
            shape = leaf.dense_shape
            first, count = (
                tf.cast([each], tf.int64) for each in (start, stop - start)
            )
            taken = tf.sparse.slice(
                leaf,
                tf.concat([first, tf.zeros_like(shape[1:])], axis=0),
                tf.concat([count, shape[1:]], axis=0),
            )
        elif isinstance(leaf, tf.Tensor) and size is not None:
            # A slice of known size, which XLA takes at any place.
            inner = [-1 if n is None else n for n in leaf.shape[1:]]
            begin = [start] + [0] * len(inner)
            taken = tf.slice(leaf, begin, [size, *inner])
        else:
            taken = leaf[start:stop]
        if not isinstance(leaf, tf.RaggedTensor):
            taken.set_shape([size, *leaf.shape[1:]])
        return taken

    return tf.nest.map_structure(take_from, data)


def spread(data, count: int):
    """Returns some rows from all over a batch, in their order.

    Args:
        data: A batch. Where a tensor of it is sparse, its first rows are taken.
        count: How many rows; all if there are no more.
    """
    rows = int(check_count(data))
    if rows <= count:
        return data
    leaves = tf.nest.flatten(data)
    if any(isinstance(leaf, tf.SparseTensor) for leaf in leaves):
        return take(data, 0, count, count)
    places = [row * (rows - 1) // (count - 1) for row in range(count)]
    return tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.gather(leaf, places), data
    )


def as_tensors(structure):
    """Converts all leaves to what a loop of TensorFlow takes."""
    kept = (tf.SparseTensor, tf.RaggedTensor, tf.TensorArray, type(None))
    return tf.nest.map_structure(
        lambda leaf: (
            leaf if isinstance(leaf, kept) else tf.convert_to_tensor(leaf)
        ),
        structure,
    )
