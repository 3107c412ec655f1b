"""The gradient noise scale that `fit` reports, over the true one.

    python -m benchmarks.noise_bias

The three models of `benchmarks.compare`, whose weights stay as they are. Each
row is drawn at random from a small set, so that the gradients of its single
rows give the true noise scale. (The BatchNormalization of the convolutional
network is frozen: it would couple the rows of a micro-batch.)

What `fit` reports follows from the products of these gradients with each other
and the rows that were drawn. So some short trainings are made, to see that it
does, and many are computed from the products alone, of 200 windows each.
Printed is the mean over these, with twice its standard error.
"""

import math

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import compare_keras
from benchmarks import compare_models
from keras_accum import noise_scale

# Windows of the trainings that are made.
FIT_WINDOWS = 20
# Few, so that their mean gradient is not lost in the noise of a window.
ROWS = 64

_TRAININGS = flags.DEFINE_integer("trainings", 2000, "Trainings to compute.")
_WINDOWS = flags.DEFINE_integer("windows", 200, "Windows of each of these.")
_FITS = flags.DEFINE_integer("fits", 2, "Trainings to make, of 20 windows.")
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


def products(model: keras.Model, x, y) -> np.ndarray:
    """Returns the inner products of the rows' gradients; a float64 matrix."""
    variables = [each.value for each in model.trainable_variables]

    @tf.function(jit_compile=True)
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        return tape.gradient(loss, variables)

    of_rows = []
    for row in range(len(x)):
        found = gradients(x[row : row + 1], y[row : row + 1])
        of_rows.append([tf.convert_to_tensor(each) for each in found])
    total = np.zeros((len(x), len(x)))
    for of_variable in zip(*of_rows, strict=True):
        flat = np.stack([np.ravel(each) for each in of_variable])
        total += flat.astype("float64") @ flat.T.astype("float64")
    return total


def drawn(case: compare_models.Case, seed: int) -> tf.data.Dataset:
    """Returns the micro-batches of a training, as indices of rows."""
    data = tf.data.Dataset.random(seed=seed).map(lambda number: number % ROWS)
    return data.batch(case.rows)


def reported(name: str, seed: int) -> float:
    """Returns what a training reports, in rows."""
    case = compare_models.CASES[name]
    x, y = case.batch(ROWS)
    # A new model has no windows of the one before.
    history = make_model(name).fit(
        drawn(case, seed).map(
            lambda rows: (tf.gather(x, rows), tf.gather(y, rows))
        ),
        steps_per_epoch=FIT_WINDOWS * case.accum_steps,
        verbose=0,
    )
    # What is reported counts what the loss is a mean over, such as tokens.
    return history.history["gradient_noise_scale"][-1] * len(y) / y.size


def computed(inner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns what trainings report, in rows.

    Args:
        inner: The `products`.
        counts: How often each micro-batch has each row, of shape `(trainings,
            windows, k, ROWS)`.
    """
    rows, k = counts[0, 0, 0].sum(), counts.shape[2]

    def squared(counts):
        gradients = counts / counts.sum(axis=-1, keepdims=True)
        return ((gradients @ inner) * gradients).sum(axis=-1)

    of_mean = squared(counts.sum(axis=2))
    traces = rows * (squared(counts).sum(axis=2) - k * of_mean) / (k - 1)
    norms = of_mean - traces / (rows * k)
    weights = noise_scale.DECAY ** np.arange(counts.shape[1])[::-1]
    return (traces @ weights) / (norms @ weights)


def counts_of(case: compare_models.Case, seed: int) -> np.ndarray:
    """Returns the `counts` of a training that is made."""
    rows = drawn(case, seed).take(FIT_WINDOWS * case.accum_steps)
    found = np.stack(list(rows.as_numpy_iterator()))
    found = np.apply_along_axis(np.bincount, 1, found, minlength=ROWS)
    return found.reshape(1, FIT_WINDOWS, case.accum_steps, ROWS)


def ratios(name: str) -> np.ndarray:
    """Returns what trainings report, over the true noise scale."""
    case = compare_models.CASES[name]
    inner = products(make_model(name), *case.batch(ROWS))
    expected = (np.trace(inner) / ROWS - inner.mean()) / inner.mean()
    print(f"{name}: the noise scale is {expected:.1f} rows", flush=True)
    for seed in range(_FITS.value):
        (same,) = computed(inner, counts_of(case, seed))
        print(
            f"{name}: a training reports {reported(name, seed):.3f} rows, and "
            f"the products {same:.3f}",
            flush=True,
        )
    rng = np.random.default_rng(0)
    shape = (1, _WINDOWS.value, case.accum_steps)
    found = [
        computed(inner, rng.multinomial(case.rows, [1 / ROWS] * ROWS, shape))
        for _ in range(_TRAININGS.value)
    ]
    return np.concatenate(found) / expected


def main(argv: list[str]) -> None:
    """Prints a table."""
    del argv
    rows = []
    for name in _CASES.value:
        found = ratios(name)
        error = np.std(found) / math.sqrt(len(found))
        rows.append(
            f"| {name} | {np.mean(found):.3f} | {2 * error:.3f} | "
            f"{np.std(found):.3f} |"
        )
    print(
        "| model | reported over true | twice its standard error | "
        "standard deviation of a training |"
    )
    print("| --- | ---: | ---: | ---: |")
    print("\n".join(rows))


if __name__ == "__main__":
    app.run(main)
