"""Time of a window with `window_metrics`, over that of one without.

    python -m benchmarks.window_metrics_time

The three models of `benchmarks.compare`, in turn, round after round in one
process. The figures to quote are the medians over the rounds of the ratios. The
time is that of the CPU, so that other programs matter less.
"""

import itertools
import statistics
import time

import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from benchmarks import compare_keras
from benchmarks import compare_models

METRICS = {
    "none again": (),
    "norm": ("gradient_norm",),
    "noise": ("gradient_noise_scale",),
    "both": ("gradient_norm", "gradient_noise_scale"),
}

_ROUNDS = flags.DEFINE_integer("rounds", 31, "Rounds that are timed.")
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", True, "Whether XLA compiles.")
_CASES = flags.DEFINE_list("cases", list(compare_models.CASES), "Which models.")


def windows(name: str, metrics: tuple):
    """Returns a function that trains on a window, after the first two."""
    case = compare_models.CASES[name]
    model = keras_accum.GradientAccumulationModel(
        *compare_keras.NETWORKS[name](),
        accum_steps=case.accum_steps,
        window_metrics=metrics,
    )
    model.compile(
        compare_keras.make_optimizer(case.optimizer),
        "sparse_categorical_crossentropy",
        jit_compile=_JIT_COMPILE.value,
    )
    data = tf.data.Dataset.from_tensors(case.batch(case.rows)).cache().repeat()
    iterator = iter(data)
    model.make_train_function()

    def window():
        for _ in range(case.accum_steps):
            logs = model.train_function(iterator)
        return float(logs["loss"]), model.optimizer.iterations.numpy()

    for _ in range(2):
        window()
    return window


def ratios(name: str) -> dict[str, float]:
    """Returns the ratios of a model, by what is measured."""
    baseline = windows(name, ())
    others = {key: windows(name, metrics) for key, metrics in METRICS.items()}
    times = {key: [] for key in others}

    def seconds(window):
        begin = time.process_time()
        window()
        return time.process_time() - begin

    for number in range(_ROUNDS.value):
        order = list(others.items())
        # None is always the first after the one that it is compared with.
        for key, window in order[number % 4 :] + order[: number % 4]:
            before, own, after = map(seconds, (baseline, window, baseline))
            times[key].append(2 * own / (before + after))
    return {key: statistics.median(each) for key, each in times.items()}


def main(argv: list[str]) -> None:
    """Prints a table."""
    del argv
    print("| model | " + " | ".join(METRICS) + " |")
    print("| --- |" + " --- |" * len(METRICS))
    for name in _CASES.value:
        found = ratios(name)
        cells = itertools.starmap("{1:.3f}".format, found.items())
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    app.run(main)
