"""Time of a window on two replicas, over the time of other ways to get there.

    python -m benchmarks.replica_time

Three ways to train on k micro-batches per replica, in turn, round after round,
with the model and the flags of `benchmarks.window_time`, in the scope of a
`MirroredStrategy`: on two GPUs, or on two devices that share the CPU.

* window: `GradientAccumulationModel`, one reduction, one update.
* ideal: k programs on each replica that only return the gradient, one
  reduction of the last of them, and a program that only updates.
* plain: `keras.Model`, k reductions, k updates. XLA does not compile it, since
  `keras.Model` cannot be compiled under a strategy with several devices.

Medians of two runs of 15 and 21 rounds, two devices on two cores, with
TensorFlow 2.21.0 and Keras 3.15.1: window / ideal 1.039 (0.981 to 1.120) and
1.057 (0.962 to 1.180), window / plain 0.511 and 0.589. While others kept the
cores busy it was 1.208 (0.929 to 1.312) and 0.552: two replicas need both
cores, so take figures from a quiet machine.

What separates a window from its ideal is mostly what `window_time` says, the
memory traffic of the buffers. The boundary adds a copy of the buffers, in one
vector: 4 ms for 33 MB. Compiled by XLA it would be 160 ms, since XLA on a CPU
looks up for each number where it comes from. The reduction itself takes about
a twentieth of the ideal.
"""

import statistics
from collections.abc import Callable

import keras
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import window_time
from examples import strategies
from keras_accum import compat

REPLICAS = 2

# The flags of `window_time`.
FLAGS = flags.FLAGS


def make_model(
    cls: type[keras.Model],
    strategy: tf.distribute.Strategy,
    jit_compile: bool | None = None,
    **kwargs,
) -> keras.Model:
    """Returns the model of `benchmarks.window_time`, on each replica."""
    with strategy.scope():
        return window_time.compile_model(
            window_time.multilayer_perceptron(cls, **kwargs), jit_compile
        )


def batches(
    strategy: tf.distribute.Strategy,
) -> tf.distribute.DistributedIterator:
    """Returns an endless iterator over one micro-batch per replica."""
    dataset = window_time.dataset(strategy.num_replicas_in_sync)
    return iter(strategy.experimental_distribute_dataset(dataset))


def by_hand(
    model: keras.Model,
    iterator: tf.distribute.DistributedIterator,
    microbatches: int,
) -> Callable[[], None]:
    """Returns what is left when nothing is accumulated: the floor for a window.

    The gradients are reduced one by one, which is faster here than to make one
    vector of them first, as the library does.

    Args:
        model: The model, compiled, on several replicas.
        iterator: Where the batches come from.
        microbatches: How many gradients are computed. The last is reduced.

    Returns:
        A function that makes one update.
    """
    strategy = model.distribute_strategy
    variables = model.trainable_variables
    destinations = [variable.value for variable in variables]
    gradient = window_time.gradient_function(model)

    @tf.function(jit_compile=FLAGS.jit_compile or None)
    def apply(gradients):
        with compat.without_communication(model.optimizer, is_tpu=False):
            model.optimizer.apply(gradients, variables)

    # `strategy.run` would lift a `tf.function` around the whole of itself.
    @tf.function(autograph=False)
    def forward_and_backward(iterator):
        return strategy.run(lambda x, y: gradient(x, y), iterator.get_next())

    @tf.function(autograph=False)
    def update(gradients):
        sums = strategy.extended.batch_reduce_to(
            tf.distribute.ReduceOp.SUM,
            list(zip(gradients, destinations, strict=True)),
        )
        strategy.run(lambda gradients: apply(gradients), (sums,))

    def run():
        for _ in range(microbatches):
            gradients = forward_and_backward(iterator)
        update(gradients)

    return run


def contestants(
    strategy: tf.distribute.Strategy,
) -> dict[str, Callable[[], None]]:
    """Returns by name a function that trains on one window's micro-batches."""
    window = make_model(
        keras_accum.GradientAccumulationModel,
        strategy,
        accum_steps=FLAGS.accum_steps,
    )
    plain = make_model(keras.Model, strategy, jit_compile=False)
    return {
        "window": window_time.through_train_function(window, batches(strategy)),
        "ideal": by_hand(
            make_model(keras.Model, strategy),
            batches(strategy),
            FLAGS.accum_steps,
        ),
        "plain": window_time.through_train_function(plain, batches(strategy)),
    }


def main(argv):
    """Prints the times and the ratios."""
    del argv
    # It tells of every reduction that it traces.
    tf.get_logger().setLevel("ERROR")
    strategy = strategies.mirrored(REPLICAS)
    times = window_time.in_turn(contestants(strategy), FLAGS.rounds)
    print(f"{'':8}{'median ms':>10}{'least ms':>10}")
    for name, each in times.items():
        median, least = 1e3 * statistics.median(each), 1e3 * min(each)
        print(f"{name:8}{median:10.1f}{least:10.1f}")
    for top, bottom in (("window", "ideal"), ("window", "plain")):
        print(f"{top} / {bottom}: {window_time.ratio(times, top, bottom)}")


if __name__ == "__main__":
    app.run(main)
