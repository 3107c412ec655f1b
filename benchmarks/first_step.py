"""Time to the first step, over that of other models.

    python -m benchmarks.first_step

What a user waits for when training starts: tracing and compiling. In each round
three new models of `benchmarks.window_time` are made, in turn, and take one
step: with k = 2, with k = 64, and a plain `keras.Model`. The figures to quote
are the medians over the rounds of the ratios.

A window has three programs where a plain step has one: the first micro-batch's,
the further ones', and the update. All are traced before the first step; XLA
compiles each when it is first run, so the first step waits for one of them.
"""

from collections.abc import Callable

import keras
from absl import app
from absl import flags

import keras_accum
from benchmarks import window_time

_FIRST_ROUNDS = flags.DEFINE_integer(
    "first_rounds", 9, "Rounds that are timed."
)


def first_step(cls: type[keras.Model], **kwargs) -> Callable[[], None]:
    """Makes a new model, and returns a function that takes its first step."""
    model = window_time.compile_model(
        window_time.multilayer_perceptron(cls, **kwargs)
    )
    iterator = window_time.batches()

    def run():
        model.make_train_function()
        model.train_function(iterator)

    return run


def main(argv):
    """Prints the ratios."""
    del argv
    ours = keras_accum.GradientAccumulationModel
    times = {"k = 2": [], "k = 64": [], "plain": []}
    for index in range(_FIRST_ROUNDS.value + 1):
        for name, function in (
            ("k = 2", first_step(ours, accum_steps=2)),
            ("k = 64", first_step(ours, accum_steps=64)),
            ("plain", first_step(keras.Model)),
        ):
            elapsed = window_time.seconds(function)
            # TensorFlow starts up in the first round.
            if index > 0:
                times[name].append(elapsed)
    for top, bottom in (("k = 64", "k = 2"), ("k = 2", "plain")):
        print(f"{top} / {bottom}: {window_time.ratio(times, top, bottom)}")


if __name__ == "__main__":
    app.run(main)
