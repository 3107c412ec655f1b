r"""What a window sends between two workers, and how long that takes.

    python -m examples.launch_workers -- python -m benchmarks.worker_traffic

Five ways to train on k micro-batches per worker, in turn, round after round.
The workers are processes of one machine, which talk over its loopback
interface. Its counter is read before and after, so other programs should not
use it meanwhile. On Linux they cannot, if it is one of its own:

    unshare --net --map-root-user sh -c "ip link set lo up && \
        python -m examples.launch_workers -- \
        python -m benchmarks.worker_traffic"

* window: `GradientAccumulationModel`, one update.
* bfloat16: the same with `communication_dtype="bfloat16"`.
* local: `window` without the update: the window does not get full.
* plain: `GradientAccumulationModel(accum_steps=1)`, k updates. `keras.Model`
  itself cannot `fit` with several workers (keras#20585).
* by hand: k updates as `benchmarks.replica_time` writes them for its ideal.

Medians of three runs of 5 to 7 rounds each, two workers on two cores, k = 8,
with TensorFlow 2.21.0 and Keras 3.15.1. A window sends 67.2 MB, as much as one
step does: window / one step 1.000 in bytes, whether plain or by hand. Without
the update it sends nothing: within 1 kB of zero, after the idle workers' 250 to
500 bytes per second are subtracted. In time,
window / plain 0.194 to 0.219 and window / by hand 0.194 to 0.210, on a machine
that others used too.

With four workers, in two rounds: bytes, bfloat16 / window 0.500.

What to expect elsewhere is arithmetic. A ring of n replicas that reduces B
bytes has each of them send 2 (n - 1) / n x B. Here B is 4 bytes for each of
8.4 million gradients, 33.6 MB, and n is 2, so that each worker sends 33.6 MB,
67.1 MB together. On other links the bytes are the same, and the ratio of 1.
One reduction takes r, the bytes that a replica sends over what its link takes
in one direction, and 8 micro-batches 8 c; updates are left out:

    window / plain = (8 c + r) / (8 c + 8 r)

* 10 Gb/s Ethernet takes 1.25 GB/s: r = 33.6 MB / 1.25 GB/s = 26.8 ms. With
  this machine's c, 130 ms / 8: (130 + 26.8) / (130 + 215) = 0.45.
* NVLink 4 takes 900 GB/s in both directions, 450 in one: r = 33.6 MB /
  450 GB/s = 0.075 ms. A GPU whose memory moves 4.8 TB/s passes over the
  weights and the buffer in c = 3 x 33.6 MB / 4.8 TB/s = 0.021 ms:
  (0.168 + 0.075) / (0.168 + 0.60) = 0.32, if starting programs and reductions
  took no time. It does, so expect less of a difference.

Larger batches and models that do more with each parameter raise c, and bring
the ratio closer to 1.
"""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import replica_time
from benchmarks import window_time
from examples import strategies

FEATURES, CLASSES = 4096, 2048
PARAMETERS = FEATURES * CLASSES

# Seconds in which what was sent arrives, and is counted.
_SETTLING = 0.3

# The flags of `window_time`, and these.
FLAGS = flags.FLAGS
_IDLE = flags.DEFINE_float("idle", 10, "Seconds of silence to measure.")
_NEVER = 10**9


def make_model(
    cls: type[keras.Model], strategy: tf.distribute.Strategy, **kwargs
) -> keras.Model:
    """Returns a model of 8.4 million parameters that does little with them."""
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((FEATURES,))
        outputs = keras.layers.Dense(CLASSES, use_bias=False)(inputs)
        model = cls(inputs, outputs, **kwargs)
        optimizer = keras.optimizers.SGD(1e-4)
        optimizer.build(model.trainable_variables)
        model.compile(
            optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=FLAGS.jit_compile,
        )
    return model


def batches(
    strategy: tf.distribute.Strategy,
) -> tf.distribute.DistributedIterator:
    """Returns an endless iterator over one micro-batch per worker."""
    rng = np.random.default_rng(0)
    rows = FLAGS.rows * strategy.num_replicas_in_sync
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    y = rng.integers(0, CLASSES, rows)
    dataset = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    return iter(strategy.experimental_distribute_dataset(dataset))


def contestants(
    strategy: tf.distribute.Strategy,
) -> dict[str, Callable[[], None]]:
    """Returns by name a function that trains on one window's micro-batches."""
    ours = functools.partial(
        make_model, keras_accum.GradientAccumulationModel, strategy
    )
    step = replica_time.by_hand(
        make_model(keras.Model, strategy), batches(strategy), microbatches=1
    )

    def steps():
        for _ in range(FLAGS.accum_steps):
            step()

    return {
        "window": window_time.through_train_function(
            ours(accum_steps=FLAGS.accum_steps), batches(strategy)
        ),
        "bfloat16": window_time.through_train_function(
            ours(accum_steps=FLAGS.accum_steps, communication_dtype="bfloat16"),
            batches(strategy),
        ),
        "local": window_time.through_train_function(
            ours(accum_steps=_NEVER), batches(strategy)
        ),
        "plain": window_time.through_train_function(
            ours(accum_steps=1), batches(strategy)
        ),
        "by hand": steps,
    }


def sent_so_far() -> int:
    """Returns the bytes that went through the loopback interface so far."""
    # Not from /sys, which may show the interface of another namespace.
    devices = pathlib.Path("/proc/net/dev").read_text(encoding="utf-8")
    for line in devices.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("There is no loopback interface.")


def idle_rate() -> float:
    """Returns the bytes per second that idle workers send."""
    time.sleep(_SETTLING)
    before = sent_so_far()
    time.sleep(_IDLE.value)
    return (sent_so_far() - before) / _IDLE.value


def bytes_sent(function: Callable[[], None], idle: float) -> float:
    """Returns the bytes that one call makes the workers send to each other.

    Args:
        function: What all workers call at this time.
        idle: What to subtract, in bytes per second.
    """
    start, before = time.perf_counter(), sent_so_far()
    function()
    time.sleep(_SETTLING)
    after, end = sent_so_far(), time.perf_counter()
    # The other worker goes on when it has seen the end, too.
    time.sleep(_SETTLING)
    return after - before - idle * (end - start)


def main(argv):
    """Prints bytes, times and ratios, on the chief."""
    del argv
    if sys.platform != "linux":
        sys.exit("It needs Linux, which counts what the interface sends.")
    # It tells of every reduction that it traces.
    tf.get_logger().setLevel("ERROR")
    strategy = strategies.multi_worker()
    functions = contestants(strategy)
    times = window_time.in_turn(functions, FLAGS.rounds)
    idle = idle_rate()
    sent = {name: [] for name in functions}
    for _ in range(FLAGS.rounds):
        for name, function in functions.items():
            sent[name].append(bytes_sent(function, idle))
    if not strategies.is_chief(strategy):
        return
    print(f"idle: {idle:,.0f} bytes/s. Gradients: {4 * PARAMETERS:,} bytes")
    print(f"{'':8}{'median ms':>10}{'median bytes':>16}")
    for name in functions:
        median = 1e3 * statistics.median(times[name])
        print(f"{name:8}{median:10.1f}{statistics.median(sent[name]):16,.0f}")
    steps = FLAGS.accum_steps
    for bottom in ("plain", "by hand"):
        of_one = [each / steps for each in sent[bottom]]
        ratio = window_time.ratio(sent | {"": of_one}, "window", "")
        print(f"bytes, window / one step {bottom}: {ratio}")
    ratio = window_time.ratio(sent, "bfloat16", "window")
    print(f"bytes, bfloat16 / window: {ratio}")
    for bottom in ("plain", "by hand", "local", "bfloat16"):
        ratio = window_time.ratio(times, "window", bottom)
        print(f"time, window / {bottom}: {ratio}")


if __name__ == "__main__":
    app.run(main)
