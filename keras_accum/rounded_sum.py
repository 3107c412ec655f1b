"""Sums of what replicas send in fewer bits than they add up in.

As ordinary code, of vectors of float32:

```python
sent = [tf.cast(vector, "bfloat16") for vector in vectors]
total = sum(tf.cast(each, "float32") for each in sent)
```

An all-reduce of bfloat16 would add up in bfloat16, and round at each replica.
"""

import tensorflow as tf

from keras_accum import compat
from keras_accum import replicas


def sum_rounded(strategy, vectors, destination: tf.Variable):
    """Sums over all replicas in float32, in cross-replica context.

    Args:
        strategy: The strategy.
        vectors: One vector per replica, in the dtype in which it is sent.
        destination: As for `reduction.reduce_across`.

    Returns:
        One vector per replica, the same for all.
    """
    if replicas.has_several_workers(strategy):
        return _sum_of_gathered(strategy, vectors, destination)
    return _sum_of_shares(strategy, vectors, destination)


def _sum_of_shares(strategy, vectors, destination):
    """Sums a share on each device, and sends each the sums of all shares.

    A replica sends as many numbers as in an all-reduce. Of more than two
    replicas, the sums are rounded once more.
    """
    vectors = strategy.experimental_local_results(vectors)
    # In a branch of a `tf.cond` tensors do not know where they are.
    devices = [each.device for each in replicas.copies(strategy, destination)]
    size, num_shares = vectors[0].shape[0], len(devices)
    if num_shares == 2:
        # The other's vector is as long as two shares and their sums.
        totals = [_sum_on(device, vectors) for device in devices]
    else:
        bounds = [size * i // num_shares for i in range(num_shares + 1)]
        sums = [
            tf.cast(
                _sum_on(device, [vector[start:end] for vector in vectors]),
                vectors[0].dtype,
            )
            for device, start, end in zip(
                devices, bounds[:-1], bounds[1:], strict=True
            )
        ]
        totals = [_concat_on(device, sums) for device in devices]
    return strategy.experimental_distribute_values_from_function(
        lambda context: totals[context.replica_id_in_sync_group]
    )


def _sum_on(device, vectors):
    with tf.device(device):
        return tf.add_n([tf.cast(vector, tf.float32) for vector in vectors])


def _concat_on(device, vectors):
    with tf.device(device):
        return tf.concat(vectors, axis=0)


def _sum_of_gathered(strategy, vectors, destination):
    """Sums on each replica what it got of all others.

    Each worker sends its vector to all others: of more than three, this is
    more than an all-reduce in float32 sends.
    """
    num_replicas = strategy.num_replicas_in_sync
    dtype = strategy.experimental_local_results(vectors)[0].dtype
    # It sends float16, of the same number of bits, and no bfloat16.
    bits = strategy.run(
        lambda vector: tf.bitcast(vector, tf.float16), args=(vectors,)
    )
    gathered = compat.gather_to(strategy, bits, destination)

    def sum_of(bits):
        each = tf.split(tf.bitcast(bits, dtype), num_replicas)
        return tf.add_n([tf.cast(vector, tf.float32) for vector in each])

    return strategy.run(sum_of, args=(gathered,))
