"""Memory and time of a window on two replicas, for buckets of several sizes.

    python -m benchmarks.replica_memory

Each case trains in a process of its own, on two devices that share the CPU: 4
dense layers, with 61 MiB of weights P on each replica, and SGD. A window has 4
micro-batches of 4 rows on each replica. The peak is the most memory that the
process ever had, beyond what it had with the weights of both replicas made, on
each replica and over P. A small model trains before that: what TensorFlow takes
for itself does not count. What is freed goes back to the system at once, as
glibc does it if asked to. Milliseconds are of a window, and the least of 9, in
a process of its own, where glibc does as it likes. It needs Linux.

On two busy cores, with TensorFlow 2.21.0 and Keras 3.15.1:

                            peak / P      ms
    keras.Model                 2.06    1259
    no boundary                 2.16     586
    one bucket                  3.14     803
    buckets                     2.16     872
    buckets, bfloat16           2.15     823
    no boundary, XLA            1.88     478
    one bucket, XLA             3.25     630
    buckets, XLA                1.90     565
    buckets, bfloat16, XLA      1.88     604

Two runs differ by half in time. "no boundary" is what micro-batches take:
buffers, and the gradients of one of them. In buckets the boundary takes no more
than these.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app

import keras_accum
from benchmarks import limited_training
from benchmarks import processes
from examples import strategies
from keras_accum import reduction

REPLICAS, ROWS, STEPS, ROUNDS = 2, 4, 4, 9
# Freed blocks of as many bytes go back to the system.
FREEING = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
WIDTH, DEPTH = 2000, 4
WEIGHTS = 4 * WIDTH * WIDTH * DEPTH


@dataclasses.dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        is_plain: Whether it is `keras.Model`, which updates at each step.
        jit_compile: Whether XLA compiles.
        updates: Whether windows end.
        bucket_mib: Most MiB of a bucket; None for what the library takes.
        communication_dtype: As for `GradientAccumulationModel`.
    """

    is_plain: bool = False
    jit_compile: bool = False
    updates: bool = True
    bucket_mib: int | None = None
    communication_dtype: str | None = None


# XLA cannot compile `keras.Model` on two devices.
CASES: dict[str, Case] = {
    "keras.Model": Case(is_plain=True),
    **{
        name + (", XLA" if jit_compile else ""): dataclasses.replace(
            case, jit_compile=jit_compile
        )
        for jit_compile in (False, True)
        for name, case in {
            "no boundary": Case(updates=False),
            "one bucket": Case(bucket_mib=2**20),
            "buckets": Case(),
            "buckets, bfloat16": Case(communication_dtype="bfloat16"),
        }.items()
    },
}


def window_of(
    case: Case, strategy: tf.distribute.Strategy, width: int
) -> Callable[[], None]:
    """Makes a model, and returns a function that trains it on a window."""
    arguments: dict = {}
    if not case.is_plain:
        arguments = {
            "accum_steps": STEPS if case.updates else 10**9,
            "communication_dtype": case.communication_dtype,
        }
    cls = keras_accum.GradientAccumulationModel if arguments else keras.Model
    with strategy.scope():
        x = inputs = keras.Input((width,))
        for _ in range(DEPTH):
            x = keras.layers.Dense(width, "tanh", use_bias=False)(x)
        model = cls(inputs, x, **arguments)
        optimizer = keras.optimizers.SGD(1e-3)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, loss="mse", jit_compile=case.jit_compile)
    for variable in model.weights:
        # Devices of one CPU share a value until one of them assigns another.
        for copy in strategy.experimental_local_results(variable.value):
            copy.assign(copy + 0.0)
    rows = np.zeros((REPLICAS * ROWS, width), "float32")
    dataset = tf.data.Dataset.from_tensors((rows, rows)).repeat()
    iterator = iter(strategy.experimental_distribute_dataset(dataset))
    train = model.make_train_function() or model.train_function

    def run():
        for _ in range(STEPS):
            train(iterator)

    return run


def measure(case: Case) -> dict[str, float]:
    """Returns the peak on each replica over P, and the seconds of a window."""
    tf.get_logger().setLevel("ERROR")
    strategy = strategies.mirrored(REPLICAS)
    if case.bucket_mib is not None:
        reduction.BUCKET_BYTES = case.bucket_mib * 2**20
    window_of(case, strategy, width=8)()
    run = window_of(case, strategy, WIDTH)
    base = limited_training.memory_mib("VmRSS")
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    peak = limited_training.memory_mib("VmHWM") - base
    return {
        "peak": peak * 2**20 / REPLICAS / WEIGHTS,
        "seconds": min(times),
    }


def main(argv: list[str]) -> None:
    """Prints a table; or measures the case that it is given."""
    if len(argv) > 1:
        print(json.dumps(measure(Case(**json.loads(argv[1])))))
        return
    print(f"{'':26}{'peak / P':>10}{'ms':>8}")
    for name, case in CASES.items():
        peak, seconds = (
            processes.result_of("benchmarks.replica_memory", case, **given)[key]
            for key, given in (("peak", FREEING), ("seconds", {}))
        )
        print(f"{name:26}{peak:10.2f}{1e3 * seconds:8.0f}", flush=True)


if __name__ == "__main__":
    app.run(main)
