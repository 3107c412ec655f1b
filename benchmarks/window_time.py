"""Time of a window, over the time of other ways to get there.

    python -m benchmarks.window_time

Eight ways to train on k micro-batches, in turn, round after round in one
process, so that a busy machine slows all of them alike. The figures to quote
are the medians over the rounds of the ratios, not the times.

* window: `GradientAccumulationModel`, one update.
* ideal: k programs that only return the gradient, and one that only updates.
* plain: `keras.Model`, k updates.
* keras: Keras's `gradient_accumulation_steps=k`, one update.
* one: `GradientAccumulationModel(accum_steps=1)`, k updates.
* split: `GradientAccumulationModel(microbatch_size=rows)`, one update, given
  all the rows at once.
* skip_window, skip_microbatch: as window, with that policy for `nonfinite`.

It takes a minute, where `benchmarks.compare` measures all of it, on three
models and against other frameworks.

All are fed by the same `tf.data` pipeline, compiled by XLA, and called through
the train function that `fit` calls.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum

FEATURES, CLASSES = 1024, 10
LAYERS = (2048, 2048, 1200)

_ROWS = flags.DEFINE_integer("rows", 4, "Rows of a micro-batch.")
_ACCUM_STEPS = flags.DEFINE_integer("accum_steps", 8, "Micro-batches, k.")
_ROUNDS = flags.DEFINE_integer("rounds", 21, "Rounds that are timed.")
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", True, "Whether XLA compiles.")


def multilayer_perceptron(cls: type[keras.Model], **kwargs) -> keras.Model:
    """Returns a classifier of 8.8 million parameters, compiled with Adam."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((FEATURES,))
    hidden = inputs
    for units in LAYERS:
        hidden = keras.layers.Dense(units, activation="relu")(hidden)
    outputs = keras.layers.Dense(CLASSES)(hidden)
    return cls(inputs, outputs, **kwargs)


def compile_model(
    model: keras.Model, jit_compile: bool | None = None, **optimizer_args
) -> keras.Model:
    """Compiles `model` in place; the optimizer's variables are made."""
    if jit_compile is None:
        jit_compile = _JIT_COMPILE.value
    optimizer = keras.optimizers.Adam(1e-4, **optimizer_args)
    optimizer.build(model.trainable_variables)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return model


def dataset(replicas: int = 1) -> tf.data.Dataset:
    """Returns one micro-batch, repeated, with rows for all replicas."""
    rng = np.random.default_rng(0)
    rows = _ROWS.value * replicas
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    y = rng.integers(0, CLASSES, rows)
    return tf.data.Dataset.from_tensors((x, y)).cache().repeat()


def batches() -> tf.data.Iterator:
    """Returns an endless iterator over one micro-batch."""
    return iter(dataset())


def through_train_function(
    model: keras.Model,
    iterator: tf.data.Iterator | None = None,
    calls: int | None = None,
) -> Callable[[], None]:
    """Calls the train function, as `fit` does.

    Args:
        model: The model, compiled.
        iterator: Where the batches come from; by default from `batches`.
        calls: How often; None for k times.
    """
    model.make_train_function()
    iterator = batches() if iterator is None else iterator

    def run():
        for _ in range(_ACCUM_STEPS.value if calls is None else calls):
            model.train_function(iterator)

    return run


def gradient_function(model: keras.Model) -> Callable:
    """Returns a program that only returns the gradient of a batch `x`, `y`."""

    @tf.function(jit_compile=_JIT_COMPILE.value or None)
    def gradient(x, y):
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.compute_loss(x, y, y_pred)
        return tape.gradient(loss, model.trainable_variables)

    return gradient


def ideal() -> Callable[[], None]:
    """Returns what is left when nothing is accumulated: a window's floor."""
    model = compile_model(multilayer_perceptron(keras.Model))
    variables = model.trainable_variables
    iterator = batches()
    gradient = gradient_function(model)

    @tf.function
    def forward_and_backward(iterator):
        return gradient(*iterator.get_next())

    @tf.function(jit_compile=_JIT_COMPILE.value or None)
    def update(gradients):
        model.optimizer.apply(gradients, variables)

    def run():
        for _ in range(_ACCUM_STEPS.value):
            gradients = forward_and_backward(iterator)
        update(gradients)

    return run


def contestants() -> dict[str, Callable[[], None]]:
    """Returns by name a function that trains on one window's micro-batches."""
    ours = keras_accum.GradientAccumulationModel
    steps = _ACCUM_STEPS.value
    return {
        "window": through_train_function(
            compile_model(multilayer_perceptron(ours, accum_steps=steps))
        ),
        "ideal": ideal(),
        "plain": through_train_function(
            compile_model(multilayer_perceptron(keras.Model))
        ),
        "keras": through_train_function(
            compile_model(
                multilayer_perceptron(keras.Model),
                gradient_accumulation_steps=steps,
            )
        ),
        "one": through_train_function(
            compile_model(multilayer_perceptron(ours, accum_steps=1))
        ),
        "split": through_train_function(
            compile_model(
                multilayer_perceptron(ours, microbatch_size=_ROWS.value)
            ),
            # A window's rows: `dataset` makes them as for `steps` replicas.
            iter(dataset(replicas=steps)),
            calls=1,
        ),
    } | {
        policy: through_train_function(
            compile_model(
                multilayer_perceptron(ours, accum_steps=steps, nonfinite=policy)
            )
        )
        for policy in ("skip_window", "skip_microbatch")
    }


def seconds(function: Callable[[], None]) -> float:
    """Returns the wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(
    functions: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """Times each function in each round; the order turns with the rounds.

    Two rounds before that are not counted: they trace and compile.
    """
    names = list(functions)
    times = {name: [] for name in names}
    for index in range(rounds + 2):
        turned = itertools.islice(
            itertools.cycle(names), index, index + len(names)
        )
        for name in turned:
            elapsed = seconds(functions[name])
            if index >= 2:
                times[name].append(elapsed)
    return times


def ratio(times: dict[str, list[float]], top: str, bottom: str) -> str:
    """Returns the median of `top / bottom`, and its middle half."""
    ratios = [a / b for a, b in zip(times[top], times[bottom], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f}  ({low:.3f} to {high:.3f})"


def main(argv):
    """Prints the times and the ratios."""
    del argv
    times = in_turn(contestants(), _ROUNDS.value)
    print(f"{'':16}{'median ms':>10}{'least ms':>10}")
    for name, each in times.items():
        median, least = 1e3 * statistics.median(each), 1e3 * min(each)
        print(f"{name:16}{median:10.1f}{least:10.1f}")
    for top, bottom in (
        ("window", "keras"),
        ("window", "plain"),
        ("window", "ideal"),
        ("one", "plain"),
        ("split", "window"),
        ("skip_window", "window"),
        ("skip_microbatch", "window"),
    ):
        print(f"{top} / {bottom}: {ratio(times, top, bottom)}")


if __name__ == "__main__":
    app.run(main)
