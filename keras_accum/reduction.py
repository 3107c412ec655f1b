"""What replicas add up: packed, in buckets of a bounded size, one by one.

Every replica packs what it gathered into a vector, the vectors are summed in
one reduction, and each takes the sum apart again. As ordinary code:

```python
for bucket in buckets(values):
    vector = pack(bucket)
    total = reduce_across(strategy, vector)
    totals += unpack(total, bucket)
```

A bucket is there no longer when the next one is packed. All at once would take
the memory of the values twice more, and each by itself a message for each.
"""

import functools
from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas
from keras_accum.rounded_sum import sum_rounded

# A message of that size takes longer than to start it, and is little beside the
# weights of a model that hardly fits. PyTorch's have 25 MiB.
BUCKET_BYTES = 16 * 2**20


def buckets(values: Sequence) -> list[list]:
    """Splits values, in their order, into runs to be packed one by one.

    Args:
        values: Tensors or variables of floats.

    Returns:
        Lists of values. Each list has at most `BUCKET_BYTES`, or one value. The
        first is there also if there are no values.
    """
    made, room = [[]], BUCKET_BYTES
    for value in values:
        size = value.shape.num_elements() * max(value.dtype.size, 4)
        if size > room and made[-1]:
            made.append([])
            room = BUCKET_BYTES
        made[-1].append(value)
        room -= size
    return made


def pack(values) -> tf.Tensor:
    """Packs all floats of a nested structure into one vector.

    It is reduced at once, at 4 bytes an entry, or 8 if anything is float64.
    """
    flat = [tf.convert_to_tensor(value) for value in tf.nest.flatten(values)]
    wide = any(value.dtype == tf.float64 for value in flat)
    dtype = tf.float64 if wide else tf.float32
    return tf.concat(
        [tf.reshape(tf.cast(value, dtype), [-1]) for value in flat], axis=0
    )


def split(vector: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    """Returns `tf.split(vector, sizes)`, without a copy if there is one."""
    return tf.split(vector, sizes) if len(sizes) > 1 else [vector]


def rounded(vector: tf.Tensor, dtype: str | None) -> tf.Tensor:
    """Returns a vector in the dtype in which it is sent."""
    return vector if dtype is None else tf.cast(vector, dtype)


def unpack(vector: tf.Tensor, like):
    """Splits a sum of `pack(like)` into tensors, in the structure `like`."""
    flat = tf.nest.flatten(like)
    sizes = [value.shape.num_elements() for value in flat]
    segments = split(vector, sizes)
    return tf.nest.pack_sequence_as(
        like,
        [
            tf.cast(tf.reshape(segment, value.shape), value.dtype)
            for segment, value in zip(segments, flat, strict=True)
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


def sum_over_replicas(
    values, destination: tf.Variable, dtype: str | None = None
):
    """Adds up `values` of all replicas, in replica context.

    Args:
        values: A nested structure of float tensors or variables.
        destination: As for `reduce_across`.
        dtype: What they are rounded to before they are sent; None if they are
            not.
    """
    strategy = tf.distribute.get_strategy()
    if not replicas.has_several(strategy):
        return tf.nest.map_structure(tf.convert_to_tensor, values)
    context = tf.distribute.get_replica_context()
    if replicas.on_tpu(strategy):
        # XLA compiles it, and knows when memory is free.
        vector = context.all_reduce(tf.distribute.ReduceOp.SUM, pack(values))
        return unpack(vector, values)
    totals, done = [], []
    for bucket in buckets(tf.nest.flatten(values)):
        # TensorFlow runs at once what waits for nothing.
        with tf.control_dependencies(done):
            vector = rounded(pack(bucket), dtype)
        vector = context.merge_call(
            reduce_across if dtype is None else sum_rounded,
            args=(vector, destination),
        )
        done = unpack(vector, bucket)
        totals += done
    return tf.nest.pack_sequence_as(values, totals)


def sum_in_place(
    strategy: tf.distribute.Strategy,
    buffers: Sequence[tf.Variable],
    rest: Callable,
    destination: tf.Variable,
    dtype: str | None = None,
):
    """Adds up over the replicas, in cross-replica context.

    On each replica `buffers` then hold the sums of all, so that these need no
    memory of their own.

    Args:
        strategy: The strategy, of several replicas.
        buffers: Variables of floats, which each replica has.
        rest: A function that returns, within a replica, what else to add up: a
            nested structure of float tensors or variables.
        destination: As for `reduce_across`.
        dtype: What the buffers' values are rounded to before they are sent;
            None if they are not.

    Returns:
        One vector per replica: the sum of `pack(rest())`.
    """
    runs = buckets(buffers)
    if dtype is not None:
        # The rest is sent by itself, as it is.
        runs = [[], *runs]
    total_of_rest, done = None, ()
    for bucket in runs:
        is_first = total_of_rest is None
        is_rounded = dtype is not None and not is_first
        pack_bucket = functools.partial(
            _pack_after,
            bucket,
            rest if is_first else list,
            dtype if is_rounded else None,
        )
        vector = strategy.run(pack_bucket, args=done)
        add_up = sum_rounded if is_rounded else reduce_across
        vector = add_up(strategy, vector, destination)
        write = functools.partial(_write, bucket, is_first)
        done = (strategy.run(write, args=(vector,)),)
        if is_first:
            (total_of_rest,) = done
    return total_of_rest


@tf.autograph.experimental.do_not_convert
def _pack_after(bucket, others, dtype, *done):
    """Packs a bucket, when the one before it is done."""
    # TensorFlow runs at once what waits for nothing.
    with tf.control_dependencies(done):
        return rounded(pack([others(), bucket]), dtype)


@tf.autograph.experimental.do_not_convert
def _write(bucket, has_others, vector):
    """Writes a bucket's sums, and returns what else was packed with it."""
    sizes = [buffer.shape.num_elements() for buffer in bucket]
    segments = split(vector, [-1, *sizes] if has_others else sizes)
    others = segments.pop(0) if has_others else tf.zeros((0,))
    written = [
        buffer.assign(tf.cast(tf.reshape(segment, buffer.shape), buffer.dtype))
        for buffer, segment in zip(bucket, segments, strict=True)
    ]
    with tf.control_dependencies(written):
        return tf.identity(others)


def taken_apart(vector: tf.Tensor, values, buffers: Sequence[tf.Variable]):
    """Returns the sums of all replicas, after `sum_in_place`.

    Args:
        vector: What `sum_in_place` returned for this replica.
        values: A nested structure, of the buffers and the rest.
        buffers: Those that it was given.
    """
    sums = [tf.convert_to_tensor(buffer) for buffer in buffers]
    rest = unpack(vector, without(values, buffers))
    return put_together(values, buffers, sums, rest)


def put_together(values, buffers: Sequence[tf.Variable], sums, rest):
    """Returns the sums of buffers and of the rest, in the structure `values`.

    Args:
        values: A nested structure, of the buffers and the rest.
        buffers: Variables.
        sums: What belongs in the place of each.
        rest: What belongs in the place of each of `without(values, buffers)`.
    """
    sums = dict(zip(map(id, buffers), sums, strict=True))
    rest = iter(rest)
    return tf.nest.map_structure(
        lambda value: sums[id(value)] if id(value) in sums else next(rest),
        values,
    )


def without(values, buffers: Sequence[tf.Variable]) -> list:
    """Returns what a nested structure has besides some variables."""
    left_out = {id(buffer) for buffer in buffers}
    flat = tf.nest.flatten(values)
    return [value for value in flat if id(value) not in left_out]
