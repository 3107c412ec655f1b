"""One training in a process of its own, whose memory may be limited.

`benchmarks.memory_limit` starts it:

    python -m benchmarks.limited_training '{"rows": 64, "limit_mib": 192, ...}'

The process builds the model and trains on two rows, twice, which starts the
threads and traces the train function. From there on memory is counted, and
`setrlimit(RLIMIT_AS)` limits the address space to what it is then and so much
more. An absolute limit would have to hold what Python, TensorFlow and the
stacks of its threads take, gigabytes that differ from machine to machine. Then
`fit` trains on the batch, a few times, and the process prints as JSON what came
of it. The batch counts too: it is made after the limit is set.
"""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import app

import keras_accum

SAMPLES, UNITS, LAYERS, CLASSES = 512, 16, 24, 10
# Updates, all on the same batch; the first, which may compile, is not timed.
UPDATES = 5
WARM_UP_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Training:
    """What one process trains.

    Attributes:
        rows: Of the batch.
        microbatch_size: Of `GradientAccumulationModel`; None: `keras.Model`.
        limit_mib: The address space that it may take beyond that of its start;
            None: all there is.
        jit_compile: Whether XLA compiles.
        dtype: Of the weights and all that is computed.
    """

    rows: int
    microbatch_size: int | None
    limit_mib: int | None
    jit_compile: bool
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        died: What it died of, if it died of memory; the rest is then unknown.
        address_mib: Its peak address space, beyond that of its start.
        resident_mib: Its peak resident memory, beyond that of its start.
        seconds: Seconds of its fastest update.
        start: All weights before it.
        end: All weights after it.
    """

    died: str | None = None
    address_mib: float = float("nan")
    resident_mib: float = float("nan")
    seconds: float = float("nan")
    start: list[float] = dataclasses.field(default_factory=list)
    end: list[float] = dataclasses.field(default_factory=list)


def classifier(training: Training) -> keras.Model:
    """Returns a model of few weights, with 0.8 MB of activations a row."""
    keras.config.set_dtype_policy(training.dtype)
    inputs = keras.Input((SAMPLES, 1), dtype="uint8")
    hidden = keras.layers.Rescaling(1 / 255)(inputs)
    for _ in range(LAYERS):
        hidden = keras.layers.Dense(UNITS, activation="tanh")(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = keras.layers.Dense(CLASSES)(hidden)
    if training.microbatch_size is None:
        model = keras.Model(inputs, outputs)
    else:
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, microbatch_size=training.microbatch_size
        )
    model.compile(
        keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=training.jit_compile,
    )
    return model


def dataset(rows: int, updates: int) -> tf.data.Dataset:
    """Returns one batch, repeated: sounds of 8 bits, to be told by loudness."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (rows, SAMPLES, 1), "uint8")
    y = rng.integers(0, CLASSES, rows, "int32")
    x //= (1 + y[:, None, None]).astype("uint8")

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(updates):
            yield x, y

    # The number of rows is left open, so that no batch is traced anew.
    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((None, SAMPLES, 1), "uint8"),
            tf.TensorSpec((None,), "int32"),
        ),
    )


class UpdateSeconds(keras.callbacks.Callback):
    """Records the seconds of every batch that `fit` trains on."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch, logs=None):
        """Takes the time."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Takes the time again."""
        self.seconds.append(time.perf_counter() - self._start)


def first_weights(model: keras.Model) -> list[np.ndarray]:
    """Returns weights to begin with, which are the same in every dtype."""
    rng = np.random.default_rng(0)
    return [
        rng.normal(0, each.shape[0] ** -0.5, each.shape).astype("float32")
        for each in model.weights
    ]


def memory_mib(name: str) -> float:
    """Returns a figure of this process, by its name in `/proc/self/status`."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 2**10


def flat(weights: list[np.ndarray]) -> list[float]:
    """Returns all weights in one list."""
    return np.concatenate([np.ravel(each) for each in weights]).tolist()


def train(training: Training) -> Outcome:
    """Trains in this process."""
    # Windows has no such module; `memory_limit` says that it needs Linux.
    import resource

    model = classifier(training)
    start = first_weights(model)
    model.fit(dataset(WARM_UP_ROWS, 2), verbose=0)
    model.set_weights(start)

    timer = UpdateSeconds()
    address, resident = memory_mib("VmSize"), memory_mib("VmRSS")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if training.limit_mib is not None:
        soft = round((address + training.limit_mib) * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    try:
        batches = dataset(training.rows, UPDATES)
        model.fit(batches, verbose=0, callbacks=[timer])
    except (tf.errors.ResourceExhaustedError, MemoryError) as error:
        return Outcome(died=type(error).__name__)
    finally:
        # What came of it can be told whatever it took.
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return Outcome(
        None,
        memory_mib("VmPeak") - address,
        memory_mib("VmHWM") - resident,
        min(timer.seconds[1:]),
        flat(start),
        flat(model.get_weights()),
    )


def main(argv: list[str]) -> None:
    """Trains what the argument says, and prints the outcome."""
    training = Training(**json.loads(argv[1]))
    print(json.dumps(dataclasses.asdict(train(training))))


if __name__ == "__main__":
    app.run(main)
