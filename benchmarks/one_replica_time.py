"""Time of a window on one replica of a strategy, over its time without one.

    python -m benchmarks.one_replica_time

The model and the flags of `benchmarks.window_time`, in turn, round after round:
without a strategy, and in the scope of a `MirroredStrategy` of one CPU, by
`accum_steps` and by `microbatch_size`; and `keras.Model` in both, which shows
what the strategy costs by itself.

Medians of 15 rounds, on two cores, with TensorFlow 2.21.0 and Keras 3.15.1, the
strategy's time over that without one: window 1.039 (0.999 to 1.059), split
0.990 (0.923 to 1.042), plain 1.020 (1.009 to 1.054); of the least times 1.013,
1.000 and 1.016. The programs have the same ops, by a test of `replicas_test`;
what is left is TensorFlow's iterator, once for each micro-batch.
"""

import statistics
from collections.abc import Callable

import keras
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import replica_time
from benchmarks import window_time

# The flags of `window_time`.
FLAGS = flags.FLAGS


def contestants(
    strategy: tf.distribute.Strategy,
) -> dict[str, Callable[[], None]]:
    """Returns by name a function that trains on one window's micro-batches."""
    steps = FLAGS.accum_steps

    def data(rows):
        dataset = window_time.dataset(rows)
        return iter(strategy.experimental_distribute_dataset(dataset))

    def train(cls, rows=1, calls=None, **kwargs):
        model = replica_time.make_model(cls, strategy, **kwargs)
        return window_time.through_train_function(model, data(rows), calls)

    ours = keras_accum.GradientAccumulationModel
    return {
        "window": train(ours, accum_steps=steps),
        # A window's rows: `dataset` makes them as for `steps` replicas.
        "split": train(ours, steps, calls=1, microbatch_size=FLAGS.rows),
        "plain": train(keras.Model),
    }


def main(argv):
    """Prints the times and the ratios."""
    del argv
    strategies = {
        "none": tf.distribute.get_strategy(),
        "mirrored": tf.distribute.MirroredStrategy(["CPU:0"]),
    }
    times = window_time.in_turn(
        {
            f"{name} {way}": function
            for name, strategy in strategies.items()
            for way, function in contestants(strategy).items()
        },
        FLAGS.rounds,
    )
    print(f"{'':16}{'median ms':>10}{'least ms':>10}")
    for name, each in times.items():
        median, least = 1e3 * statistics.median(each), 1e3 * min(each)
        print(f"{name:16}{median:10.1f}{least:10.1f}")
    for way in ("window", "split", "plain"):
        top, bottom = f"mirrored {way}", f"none {way}"
        print(f"{top} / {bottom}: {window_time.ratio(times, top, bottom)}")


if __name__ == "__main__":
    app.run(main)
