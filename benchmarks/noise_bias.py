"""The gradient noise scale that `fit` reports, over the true one.

    python -m benchmarks.noise_bias

The three models of `benchmarks.compare`, whose weights stay as they are. Each
row is drawn at random from a small set, so that the gradients of its single
rows give the true noise scale. Printed is the mean over some trainings, of 200
windows each, with twice its standard error. (The BatchNormalization of the
convolutional network is frozen: it would couple the rows of a micro-batch.)
"""

import math
import statistics

import keras
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import compare_keras
from benchmarks import compare_models

# Few, so that their mean gradient is not lost in the noise of a window.
ROWS = 64

_TRAININGS = flags.DEFINE_integer("trainings", 8, "Trainings of each model.")
_WINDOWS = flags.DEFINE_integer("windows", 200, "Windows of each training.")
_CASES = flags.DEFINE_list("cases", list(compare_models.CASES), "Which models.")


def make_model(name: str) -> keras_accum.GradientAccumulationModel:
    """Returns a model that learns nothing."""
    keras.utils.set_random_seed(0)
    model = keras_accum.GradientAccumulationModel(
        *compare_keras.NETWORKS[name](),
        accum_steps=compare_models.CASES[name].accum_steps,
        window_metrics=["gradient_noise_scale"],
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    return model


def truth(model: keras.Model, x, y) -> float:
    """Returns the noise scale of rows that are drawn at random, in rows."""
    variables = [each.value for each in model.trainable_variables]

    @tf.function(jit_compile=True)
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        return tape.gradient(loss, variables)

    def squared(tensors):
        return math.fsum(
            tf.reduce_sum(tf.square(tf.cast(each, tf.float64))).numpy()
            for each in tensors
        )

    total, squares = None, []
    for row in range(len(x)):
        found = gradients(x[row : row + 1], y[row : row + 1])
        found = [tf.convert_to_tensor(each) for each in found]
        squares.append(squared(found))
        total = found if total is None else list(map(tf.add, total, found))
    of_mean = squared(total) / len(x) ** 2
    return (statistics.fmean(squares) - of_mean) / of_mean


def ratios(name: str) -> list[float]:
    """Returns what each training reports, over the true noise scale."""
    case = compare_models.CASES[name]
    x, y = case.batch(ROWS)
    expected = truth(make_model(name), x, y)
    print(f"{name}: the noise scale is {expected:.1f} rows", flush=True)
    # What is reported counts what the loss is a mean over, such as tokens.
    expected *= y.size / len(y)
    found = []
    for seed in range(_TRAININGS.value):
        # A new model has no windows of the one before.
        model = make_model(name)
        data = (
            tf.data.Dataset.random(seed=seed)
            .map(lambda number: number % ROWS)
            .batch(case.rows)
            .map(lambda rows: (tf.gather(x, rows), tf.gather(y, rows)))
        )
        history = model.fit(
            data,
            steps_per_epoch=_WINDOWS.value * case.accum_steps,
            verbose=0,
        )
        found.append(history.history["gradient_noise_scale"][-1] / expected)
    return found


def main(argv: list[str]) -> None:
    """Prints a table."""
    del argv
    print("| model | reported over true | twice its standard error |")
    print("| --- | ---: | ---: |")
    for name in _CASES.value:
        found = ratios(name)
        error = statistics.stdev(found) / math.sqrt(len(found))
        print(
            f"| {name} | {statistics.fmean(found):.3f} | {2 * error:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
