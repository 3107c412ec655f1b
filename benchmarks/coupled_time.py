"""Time of a window whose loss couples rows, over that of a row-wise loss.

And with `accum_steps`: of one whose losses have two denominators, a mean and an
added sum, over that of one whose added loss is a mean as well.

    python -m benchmarks.coupled_time

On the models of `benchmarks.compare`, in turn, round after round in one
process. The first is with `microbatch_size`. The figures to quote are the
medians over the rounds of the ratios. It also prints how much of the first step
goes into finding out that a loss is row-wise.
"""

import statistics
import time

import keras
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import compare_keras
from benchmarks import compare_models
from keras_accum import first_batch

_MODELS = flags.DEFINE_list(
    "models", list(compare_models.CASES), "Which models."
)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds that are timed.")
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", True, "Whether XLA compiles.")


def masked_mean(y, y_pred):
    """Returns the mean over the labels that are not 0; a scalar."""
    losses = keras.losses.sparse_categorical_crossentropy(
        y, y_pred, from_logits=True
    )
    mask = keras.ops.cast(y != 0, losses.dtype)
    return keras.ops.sum(losses * mask) / keras.ops.sum(mask)


class Added(keras.layers.Layer):
    """Adds a loss of its inputs."""

    def __init__(self, reduce, **kwargs) -> None:
        super().__init__(**kwargs)
        self._reduce = reduce

    def call(self, inputs):
        """Returns the inputs."""
        self.add_loss(1e-6 * self._reduce(keras.ops.square(inputs)))
        return inputs


def make_step(name: str, loss, added=None):
    """Returns a function that trains on a window.

    Args:
        name: The model.
        loss: The loss.
        added: What a layer adds, as a function of the squares of the outputs;
            then micro-batches are given one by one.
    """
    case = compare_models.CASES[name]
    keras.utils.set_random_seed(0)
    inputs, outputs = compare_keras.NETWORKS[name]()
    arguments = {"microbatch_size": case.rows}
    rows, calls = case.rows * case.accum_steps, 1
    if added is not None:
        outputs = Added(added)(outputs)
        arguments = {"accum_steps": case.accum_steps}
        rows, calls = case.rows, case.accum_steps
    model = keras_accum.GradientAccumulationModel(inputs, outputs, **arguments)
    model.compile(
        compare_keras.make_optimizer(case.optimizer),
        loss,
        jit_compile=_JIT_COMPILE.value,
    )
    data = tf.data.Dataset.from_tensors(case.batch(rows)).repeat()
    function, iterator = model.make_train_function(), iter(data)

    def step():
        start = time.perf_counter()
        for _ in range(calls):
            logs = function(iterator)
        float(logs["loss"])
        return time.perf_counter() - start

    return step


def ratios_of(steps) -> list[float]:
    """Returns the ratios of two steps' times, in order."""
    ratios = []
    for number in range(_ROUNDS.value):
        order = steps if number % 2 else steps[::-1]
        times = {step: step() for step in order}
        ratios.append(times[steps[1]] / times[steps[0]])
    return sorted(ratios)


def middle(ratios) -> str:
    """Returns the median of ratios, and the half of them around it."""
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


class Stopwatch:
    """Times the calls of a function.

    Attributes:
        seconds: How long all of them took.
    """

    def __init__(self, function) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args):
        """Calls it."""
        start = time.perf_counter()
        result = self._function(*args)
        self.seconds += time.perf_counter() - start
        return result


def main(argv) -> None:
    """Prints the ratios."""
    del argv
    rowwise = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for name in _MODELS.value:
        looking = Stopwatch(first_batch.measure_losses)
        first_batch.measure_losses = looking
        steps = [make_step(name, loss) for loss in (rowwise, masked_mean)]
        first = steps[0]()
        share = looking.seconds / first
        steps[1]()
        first_batch.measure_losses = looking._function
        print(
            f"{name}: coupled / row-wise {middle(ratios_of(steps))}; looking "
            f"takes {100 * share:.1f} % of the first step, {first:.1f} s",
            flush=True,
        )
        steps = [
            make_step(name, rowwise, added)
            for added in (keras.ops.mean, keras.ops.sum)
        ]
        for step in steps:
            step()
        print(
            f"{name}: two denominators / one {middle(ratios_of(steps))}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
