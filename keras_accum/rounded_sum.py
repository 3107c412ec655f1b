"""Sums of what replicas send in fewer bits than they add up in.

As ordinary code, of vectors of float32:

```python
sent = [tf.cast(vector, "bfloat16") for vector in vectors]
total = sum(tf.cast(each, "float32") for each in sent)
```

An all-reduce of bfloat16 would add up in bfloat16, and round at each replica.
So each replica adds up a share of the vectors, and sends the sums of its share
to all others, rounded once more. In this way it sends as many numbers as in an
all-reduce. Two replicas send each other the whole vector: it is as long as two
shares and their sums.
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
    if not replicas.has_several_workers(strategy):
        return _sum_on_devices(strategy, vectors, destination)
    if strategy.num_replicas_in_sync == 2:
        return _sum_of_gathered(strategy, vectors, destination)
    return _sum_of_exchanged(strategy, vectors, destination)


def _sum_on_devices(strategy, vectors, destination):
    """Sums on the devices of one worker, which takes no collective."""
    vectors = strategy.experimental_local_results(vectors)
    # In a branch of a `tf.cond` tensors do not know where they are.
    devices = [each.device for each in replicas.copies(strategy, destination)]
    size, num_shares = vectors[0].shape[0], len(devices)
    if num_shares == 2:
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
        return _sum(vectors)


def _concat_on(device, vectors):
    with tf.device(device):
        return tf.concat(vectors, axis=0)


def _sum_of_gathered(strategy, vectors, destination):
    """Sums on each replica the vectors of all."""
    gathered = _gather(strategy, vectors, destination)
    num_replicas = strategy.num_replicas_in_sync
    return strategy.run(
        lambda whole: _sum(tf.split(whole, num_replicas)), args=(gathered,)
    )


def _sum_of_exchanged(strategy, vectors, destination):
    """Sums on each replica a share of the vectors of all, and gathers them."""
    num_replicas = strategy.num_replicas_in_sync
    (size,) = strategy.experimental_local_results(vectors)[0].shape
    padding = -size % num_replicas

    def shares_of(vector):
        padded = tf.pad(vector, [[0, padding]])
        return _bits(tf.reshape(padded, [num_replicas, -1]))

    def sum_share(bits):
        shares = tf.unstack(_from_bits(bits), num=num_replicas)
        return tf.cast(_sum(shares), tf.bfloat16)

    shares = strategy.run(shares_of, args=(vectors,))
    shares = compat.exchange(strategy, shares)
    sums = strategy.run(sum_share, args=(shares,))
    sums = _gather(strategy, sums, destination)
    return strategy.run(lambda whole: whole[:size], args=(sums,))


def _gather(strategy, vectors, destination):
    bits = strategy.run(_bits, args=(vectors,))
    gathered = compat.gather_to(strategy, bits, destination)
    return strategy.run(_from_bits, args=(gathered,))


def _sum(vectors):
    return tf.add_n([tf.cast(vector, tf.float32) for vector in vectors])


def _bits(value):
    """Returns bfloat16 as a type of as many bits that collectives know."""
    return tf.bitcast(value, tf.float16)


def _from_bits(bits):
    return tf.bitcast(bits, tf.bfloat16)
