"""One training of the digits example, with what there is to measure in it."""

import contextlib
import dataclasses
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_accum
from examples import digits_dataset

_SHUFFLE_BUFFER = 10_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both trainings share; each field is the flag of its name.

    Either `accum_steps` or `microbatch_size` is None.
    """

    dataset: str
    data_dir: str | None
    batch_size: int
    accum_steps: int | None
    microbatch_size: int | str | None
    epochs: int
    learning_rate: float
    precision: str
    jit_compile: bool
    seed: int

    @property
    def step_size(self) -> int:
        """Images per step of `fit` where there is accumulation."""
        return self.batch_size // (self.accum_steps or 1)

    @property
    def test_size(self) -> int:
        """Images per step of `evaluate`."""
        if isinstance(self.microbatch_size, int):
            return self.microbatch_size
        return self.step_size


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of one training; `losses` has one entry per update."""

    updates: int
    accuracy: float
    weights: list[np.ndarray]
    losses: list[float]
    peak_mib: float
    seconds: float


class UpdateLosses(keras.callbacks.Callback):
    """Records the loss of every update.

    Keras reports the mean over the epoch's images so far. What an update adds
    to their sum, divided by the number of its own images, is its loss.

    Args:
        step_size: Images per step of `fit`.
        batch_size: Images per update.
        epoch_size: Images per epoch.
    """

    def __init__(self, step_size: int, batch_size: int, epoch_size: int):
        super().__init__()
        self.losses: list[float] = []
        self._step_size = step_size
        self._batch_size = batch_size
        self._epoch_size = epoch_size

    def on_epoch_begin(self, epoch, logs=None):
        """Begins a new mean, as Keras does."""
        self._images, self._sum = 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        """Records a loss if this step was the last of its update."""
        images = min((batch + 1) * self._step_size, self._epoch_size)
        if images % self._batch_size and images < self._epoch_size:
            return
        total = logs["loss"] * images
        self.losses.append((total - self._sum) / (images - self._images))
        self._images, self._sum = images, total


def build_model(
    info: tfds.core.DatasetInfo, settings: Settings, accumulate: bool
) -> keras.Model:
    """Returns a small convolutional classifier.

    Args:
        info: What a builder says about its images and labels.
        settings: How an update is split into micro-batches.
        accumulate: Whether it is; if not, the model is a plain `keras.Model`.
    """
    image = info.features["image"]
    inputs = keras.Input(image.shape, dtype=image.np_dtype)
    x = keras.layers.Rescaling(1 / 255)(inputs)
    # The slope of a ReLU has a step, beside which rounding decides, and two
    # trainings that differ by rounding drift apart. GELU has no step.
    x = keras.layers.Conv2D(32, 3, padding="same", activation="gelu")(x)
    x = keras.layers.Conv2D(64, 3, padding="same", activation="gelu")(x)
    x = keras.layers.AveragePooling2D(2, padding="same")(x)
    x = keras.layers.Conv2D(64, 3, padding="same", activation="gelu")(x)
    x = keras.layers.Flatten()(x)
    outputs = keras.layers.Dense(info.features["label"].num_classes)(x)
    if not accumulate:
        return keras.Model(inputs, outputs)
    return keras_accum.GradientAccumulationModel(
        inputs,
        outputs,
        accum_steps=settings.accum_steps or 1,
        microbatch_size=settings.microbatch_size,
    )


def train(settings: Settings, accumulate: bool) -> Run:
    """Trains and tests once.

    Args:
        settings: What the trainings that are compared have in common.
        accumulate: Whether micro-batches make an update, or the large batch.
    """
    if settings.precision == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(settings.precision)
    images, test_images, info = digits_dataset.open_dataset(
        settings.dataset, settings.data_dir
    )
    # After the set was prepared, which draws random numbers the first time.
    keras.utils.set_random_seed(settings.seed)
    model = build_model(info, settings, accumulate)
    model.compile(
        optimizer=keras.optimizers.Adam(settings.learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=settings.jit_compile,
    )
    # Shuffled before they are batched, so that the micro-batches of a window
    # are the images of the large batch. The epoch's last batch may be short.
    step_size = settings.step_size if accumulate else settings.batch_size
    batches = (
        images.cache()
        .shuffle(_SHUFFLE_BUFFER, seed=settings.seed)
        .batch(step_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    epoch_size = int(images.cardinality())
    losses = UpdateLosses(step_size, settings.batch_size, epoch_size)
    start = time.perf_counter()
    model.fit(
        batches, epochs=settings.epochs, callbacks=[losses], shuffle=False
    )
    seconds = time.perf_counter() - start
    # In micro-batches in both trainings: the peak is then that of training.
    test_batches = test_images.batch(settings.test_size)
    tested = model.evaluate(test_batches, return_dict=True, verbose=0)
    return Run(
        updates=int(model.optimizer.iterations),
        accuracy=tested["accuracy"],
        weights=[weight.astype(np.float64) for weight in model.get_weights()],
        losses=losses.losses,
        peak_mib=_peak_memory_mib(),
        seconds=seconds,
    )


def _peak_memory_mib() -> float:
    """Returns the most resident memory of this process so far, or NaN."""
    with contextlib.suppress(FileNotFoundError):
        # Linux hands a parent's `ru_maxrss` on to its children, even to those
        # that run another program. This figure begins with the program.
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    try:
        # Windows has no such module.
        import resource
    except ModuleNotFoundError:
        return float("nan")
    # macOS counts it in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
