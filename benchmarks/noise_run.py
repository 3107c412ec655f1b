"""The gradient noise scale in a training of the language model example.

    python -m benchmarks.noise_run --picture=docs/batch_size.png

A transformer with 2 layers of width 64 learns to predict the next byte of
Python's own help texts. A micro-batch has 8 rows of 128 bytes, a window 8 of
them. The picture has the loss, the noise scale with its 95 % interval, and the
size of a window, all over the updates; and what follows for the last epoch: how
many updates and how many bytes trainings with other windows need, over the
least that any needs.
"""

import json
import pathlib

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags
from matplotlib import figure
from matplotlib import ticker

import keras_accum
from examples import language_model_network
from examples import language_model_text

SHAPE = language_model_network.Shape(context=128, layers=2, width=64, heads=2)
ROWS, ACCUM_STEPS = 8, 8
EPOCHS, UPDATES = 40, 15
LEARNING_RATE, WARM_UP = 4e-3, 30
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
NOISE = "gradient_noise_scale"

_PICTURE = flags.DEFINE_string("picture", None, "The PNG file to write.")
_RESULTS = flags.DEFINE_string(
    "results", None, "A JSON file: read if it is there, else written."
)


def measure() -> dict[str, list[float]]:
    """Trains, and returns the history of the epochs."""
    keras.utils.set_random_seed(0)
    model = language_model_network.build_model(
        SHAPE,
        keras_accum.GradientAccumulationModel,
        accum_steps=ACCUM_STEPS,
        window_metrics=("gradient_norm", NOISE),
    )
    updates = EPOCHS * UPDATES
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        updates - WARM_UP,
        warmup_target=LEARNING_RATE,
        warmup_steps=WARM_UP,
        alpha=0.1,
    )
    model.compile(
        keras.optimizers.AdamW(rate, beta_2=0.95, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        jit_compile=True,
    )
    texts, _ = language_model_text.documents()
    rows = language_model_text.BATCHINGS["packed"](texts, SHAPE.context)
    batches = updates * ACCUM_STEPS
    data = language_model_text.batches(
        rows, ROWS, first=0, last=batches, seed=0
    )
    history = model.fit(
        data,
        epochs=EPOCHS,
        steps_per_epoch=UPDATES * ACCUM_STEPS,
        shuffle=False,
        verbose=2,
    )
    return {
        name: list(map(float, values))
        for name, values in history.history.items()
    }


def draw(history: dict[str, list[float]], path: pathlib.Path) -> None:
    """Draws the run, and what follows from its last epoch."""
    updates = UPDATES * np.arange(1, EPOCHS + 1)
    window = ROWS * SHAPE.context * ACCUM_STEPS
    page = figure.Figure(figsize=(9, 6.6), layout="constrained")
    axes = page.subplots(2, 2)
    (loss, norm), (noise, needed) = axes
    loss.plot(updates, history["loss"], color=BLUE)
    loss.set_title("Loss (nats per byte)")
    norm.plot(updates, history["gradient_norm"], color=BLUE)
    norm.set_title("gradient_norm (before clipping)")
    noise.fill_between(
        updates,
        history[f"{NOISE}_low"],
        np.minimum(history[f"{NOISE}_high"], 1e7),
        color=BLUE,
        alpha=0.25,
        linewidth=0,
        label="95 % interval",
    )
    noise.plot(updates, history[NOISE], color=BLUE, label="noise scale")
    noise.axhline(window, color=ORANGE, linestyle="--", label="this window")
    noise.set_yscale("log")
    noise.set_ylim(max(min(history[f"{NOISE}_low"]) / 2, 50), window * 10)
    noise.set_title("gradient_noise_scale (bytes)")
    noise.legend(frameon=False)
    for axis in (loss, norm, noise):
        axis.set_xlabel("updates")
    scale = history[NOISE][-1]
    sizes = np.geomspace(scale / 30, scale * 30, 100)
    needed.plot(
        sizes, 1 + scale / sizes, color=BLUE, label="updates, over the fewest"
    )
    needed.plot(
        sizes, 1 + sizes / scale, color=GREEN, label="bytes, over the fewest"
    )
    needed.axvline(window, color=ORANGE, linestyle="--", label="this window")
    needed.axvline(scale, color="#7F7F7F", linestyle=":", label="noise scale")
    needed.set_xscale("log")
    needed.set_yscale("log")
    needed.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    needed.set_ylim(0.9, 100)
    needed.set_yticks([1, 2, 5, 10, 30])
    needed.minorticks_off()
    needed.set_title("What follows at the end, by the theory")
    needed.set_xlabel("bytes in a window")
    needed.legend(ncols=2, loc="upper center", framealpha=1, edgecolor="none")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    page.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Measures, unless that was done, and draws."""
    del argv
    tf.get_logger().setLevel("ERROR")
    results = pathlib.Path(_RESULTS.value) if _RESULTS.value else None
    if results is not None and results.exists():
        history = json.loads(results.read_text(encoding="utf-8"))
    else:
        history = measure()
    if results is not None:
        results.write_text(json.dumps(history), encoding="utf-8")
    for name in (NOISE, f"{NOISE}_low", f"{NOISE}_high", "loss"):
        print(name, [round(value, 3) for value in history[name][::5]])
    if _PICTURE.value:
        draw(history, pathlib.Path(_PICTURE.value))


if __name__ == "__main__":
    app.run(main)
