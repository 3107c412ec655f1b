"""Time of a window whose loss couples rows, over that of a row-wise loss.

    python -m benchmarks.coupled_time

On the models of `benchmarks.compare`, with `microbatch_size`, in turn, round
after round in one process. The figures to quote are the medians over the rounds
of the ratios. It also prints how much of the first step goes into finding out
that a loss is row-wise.
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


def make_step(name: str, loss):
    """Returns a function that trains on a window, and the model."""
    case = compare_models.CASES[name]
    keras.utils.set_random_seed(0)
    inputs, outputs = compare_keras.NETWORKS[name]()
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, microbatch_size=case.rows
    )
    model.compile(
        compare_keras.make_optimizer(case.optimizer),
        loss,
        jit_compile=_JIT_COMPILE.value,
    )
    rows = case.rows * case.accum_steps
    data = tf.data.Dataset.from_tensors(case.batch(rows)).repeat()
    function, iterator = model.make_train_function(), iter(data)

    def step():
        start = time.perf_counter()
        logs = function(iterator)
        float(logs["loss"])
        return time.perf_counter() - start

    return step


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
        ratios = []
        for number in range(_ROUNDS.value):
            order = steps if number % 2 else steps[::-1]
            times = {step: step() for step in order}
            ratios.append(times[steps[1]] / times[steps[0]])
        ratios.sort()
        print(
            f"{name}: coupled / row-wise {statistics.median(ratios):.3f}  "
            f"({ratios[len(ratios) // 4]:.3f} to "
            f"{ratios[-1 - len(ratios) // 4]:.3f}); looking takes "
            f"{100 * share:.1f} % of the first step, {first:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
