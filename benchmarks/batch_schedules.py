"""Rows and updates to a loss: fixed batches against schedules of k.

    python -m benchmarks.batch_schedules --results=runs.json --picture=runs.png

The language model of `examples`, with 2 layers of width 64, learns to predict
the next byte of Python's own help texts. A micro-batch has 8 rows of 128 bytes.
Counted is what it takes until the loss on held-out documents is 1.6 nats per
byte. That loss is computed after every 1,024 rows, and between two of these a
line is drawn.

* k = 1, 4 and 16: the learning rate stays, after a warm-up of 1,024 rows.
* cosine: the fixed k that took the fewest rows, and a cosine to 0.
* Seesaw: k begins with that, and `schedules.Seesaw` makes it grow where the
  same cosine would fall by half.
* NoiseScale: k follows the gradient noise scale, from 1 to 16, and the learning
  rate stays, after the warm-up.

Each is tuned alike: of three learning rates, the one with the fewest rows for
one seed is taken for three. What is far behind another rate, or has taken more
rows, is stopped. A cosine has to end: of three lengths, the least is taken with
which all seeds come to the loss, and the rates are compared with the second.
(So the schedules have one number more to tune, and the seed that rates are
chosen with counts in the table, for all alike.)
All of them have AdamW, whose gradients are clipped to a norm of 1.

With TensorFlow 2.21.0 and Keras 3.15.1:

                rate  of rows                       rows                 updates
  k = 1        0.002           21,485 (19,756 to 23,988)  2,686 (2,469 to 2,999)
  k = 4        0.004           26,300 (24,022 to 27,530)        822 (751 to 860)
  k = 16       0.008           50,351 (47,687 to 54,357)        393 (373 to 425)
  cosine       0.004   18,432  15,378 (14,100 to 16,122)  1,922 (1,763 to 2,015)
  Seesaw       0.004   18,432  14,218 (13,374 to 15,763)  1,439 (1,421 to 1,472)
  NoiseScale   0.004           15,842 (14,128 to 16,874)  1,361 (1,266 to 1,500)
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

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
ROWS, EVERY = 8, 1024  # Of a micro-batch; and from one evaluation to the next.
WARM_UP, MOST = 1024, 80 * 1024  # Rows.
# Of a cosine, in rows; the second is tuned with.
LENGTHS = (16384, 18432, 20480)
# How far behind another rate a run is stopped, and after how many rows.
BEHIND, PATIENCE = 0.2, 8192
TARGET = 1.6  # Nats per byte.
SEEDS = (0, 1, 2)
# Of each fixed k, in the order in which they are tried.
RATES = {
    1: (0.002, 0.001, 0.004),
    4: (0.004, 0.002, 0.008),
    16: (0.008, 0.004, 0.016),
}
# A rate that falls may begin with more.
FALLING = {k: (rates[0], rates[2], 2 * rates[2]) for k, rates in RATES.items()}
# Of Okabe and Ito, which readers with colour blindness can tell apart.
COLORS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")

_RESULTS = flags.DEFINE_string(
    "results", None, "A JSON file of the runs: those in it are not repeated."
)
_PICTURE = flags.DEFINE_string("picture", None, "The PNG file to write.")
_THREADS = flags.DEFINE_integer(
    "threads", 0, "How many threads TensorFlow may have; 0 for all cores."
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to choose k and the learning rate.

    Attributes:
        name: What the table calls it.
        make: Function of the highest rate and the rows of the training, to
            `accum_steps` and the optimizer's learning rate.
        rates: The rates that are tried.
        lengths: The rows that are tried.
    """

    name: str
    make: Callable
    rates: tuple[float, ...]
    lengths: tuple[int, ...]


@dataclasses.dataclass
class Run:
    """What one training gave.

    Attributes:
        name: The arm.
        rate: The highest learning rate.
        rows: Of the whole training, if it is not stopped before.
        seed: Decides the initial weights and the order of the rows.
        losses: Held-out, after every 1,024 rows.
        updates: So far, at the same times.
        seconds: Of the CPU.
    """

    name: str
    rate: float
    rows: int
    seed: int
    losses: list[float]
    updates: list[int]
    seconds: float

    def reached(self) -> tuple[float, float]:
        """Returns the rows and updates to the target; infinite if missed."""
        for i, loss in enumerate(self.losses):
            if loss <= TARGET:
                # No model is at the target at once: there is one before.
                part = (self.losses[i - 1] - TARGET) / (
                    self.losses[i - 1] - loss
                )
                low, high = self.updates[i - 1 : i + 1]
                return EVERY * (i + part), low + part * (high - low)
        return np.inf, np.inf

    def order(self) -> tuple[float, float]:
        """Returns the rows to the target, and if missed, the least loss."""
        return self.reached()[0], min(self.losses)


def steady(rate: float, k: int) -> keras.optimizers.schedules.PolynomialDecay:
    """Returns a rate that stays after the warm-up."""
    steps = WARM_UP // (ROWS * k)
    return keras.optimizers.schedules.PolynomialDecay(rate / steps, steps, rate)


def cosine(
    rate: float, rows: int, k: int
) -> keras.optimizers.schedules.CosineDecay:
    """Returns a rate that falls to 0 like a cosine after the warm-up."""
    warm_up = WARM_UP // (ROWS * k)
    return keras.optimizers.schedules.CosineDecay(
        rate / warm_up,
        rows // (ROWS * k) - warm_up,
        warmup_target=rate,
        warmup_steps=warm_up,
    )


def seesaw(rate: float, rows: int, k: int):
    """Returns k and the rate of `Seesaw`, from the cosine."""
    schedule = keras_accum.schedules.Seesaw(
        cosine(rate, rows, k), rows // (ROWS * k), k, maximum=16 * k
    )
    return schedule, schedule.learning_rate


def fixed_arms() -> list[Arm]:
    """Returns the arms whose k is fixed, and whose rate stays."""
    return [
        Arm(
            f"k = {k}",
            lambda rate, rows, k=k: (k, steady(rate, k)),
            RATES[k],
            (MOST,),
        )
        for k in RATES
    ]


def noise_arm() -> Arm:
    """Returns the arm whose k follows the noise of gradients."""
    return Arm(
        "NoiseScale",
        lambda rate, rows: (
            keras_accum.schedules.NoiseScale(1, max(RATES)),
            steady(rate, 1),
        ),
        RATES[1],
        (MOST,),
    )


def other_arms(k: int) -> list[Arm]:
    """Returns the arms that begin with k, the best fixed one."""
    return [
        Arm(
            "cosine",
            lambda rate, rows: (k, cosine(rate, rows, k)),
            FALLING[k],
            LENGTHS,
        ),
        Arm(
            "Seesaw",
            lambda rate, rows: seesaw(rate, rows, k),
            FALLING[k],
            LENGTHS,
        ),
    ]


class Recorder(keras.callbacks.Callback):
    """Records, and stops at the target or where another run was better.

    Args:
        run: Where to record.
        best: The other run, or None.
    """

    def __init__(self, run: Run, best: Run | None):
        super().__init__()
        self.run, self.best = run, best

    def on_epoch_end(self, epoch, logs=None):
        """Records the loss and the updates so far."""
        self.run.losses.append(logs["val_loss"])
        self.run.updates.append(int(self.model.optimizer.iterations))
        loss, rows = logs["val_loss"], (epoch + 1) * EVERY
        self.model.stop_training = loss <= TARGET
        if self.best is not None:
            others = [*self.best.losses, -np.inf]
            if rows >= PATIENCE and loss > others[epoch] + BEHIND:
                self.model.stop_training = True


def train(arm: Arm, setting, seed: int, best: Run | None) -> Run:
    """Trains until the target, the end, or where `best` was better."""
    run = Run(arm.name, *setting, seed, [], [], 0.0)
    start = time.process_time()
    accum_steps, learning_rate = arm.make(*setting)
    texts, held_texts = language_model_text.documents()
    rows = language_model_text.packed(texts, SHAPE.context)
    held = language_model_text.packed(held_texts, SHAPE.context)
    keras.utils.set_random_seed(seed)
    model = language_model_network.build_model(
        SHAPE,
        keras_accum.GradientAccumulationModel,
        accum_steps=accum_steps,
        # An epoch is the time between two evaluations, and ends no window.
        partial_window="carry",
    )
    optimizer = keras.optimizers.AdamW(
        learning_rate, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(
        var_names=["bias", "beta", "gamma", "embeddings"]
    )
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        jit_compile=True,
    )
    model.fit(
        language_model_text.batches(
            rows, ROWS, first=0, last=run.rows // ROWS, seed=seed
        ),
        epochs=run.rows // EVERY,
        steps_per_epoch=EVERY // ROWS,
        validation_data=(held.inputs, held.targets, held.weights),
        # In one batch, so that each byte counts alike.
        validation_batch_size=len(held),
        shuffle=False,
        callbacks=[Recorder(run, best)],
        verbose=0,
    )
    run.seconds = time.process_time() - start
    return run


class Runs:
    """All runs so far, kept in a file.

    Args:
        file: A JSON file, or None.
    """

    def __init__(self, file: str | None):
        self._file = file and pathlib.Path(file)
        self._runs = {}
        if self._file and self._file.exists():
            for each in json.loads(self._file.read_text(encoding="utf-8")):
                self._add(Run(**each))

    def _add(self, run):
        self._runs[run.name, (run.rate, run.rows), run.seed] = run

    def get(self, arm: Arm, setting, seed: int, best: Run | None = None) -> Run:
        """Returns a run, which is made if it is not there."""
        key = arm.name, setting, seed
        if key not in self._runs:
            run = train(arm, setting, seed, best)
            self._add(run)
            rows, updates = run.reached()
            print(
                f"{run.name}, rate {run.rate}, {run.rows} rows, seed {seed}: "
                f"{rows:.0f} rows, {updates:.0f} updates; last loss "
                f"{run.losses[-1]:.3f}; {run.seconds:.0f} s",
                flush=True,
            )
            if self._file:
                runs = [dataclasses.asdict(r) for r in self._runs.values()]
                self._file.write_text(json.dumps(runs), encoding="utf-8")
        return self._runs[key]

    def tuned(self, arm: Arm) -> list[Run]:
        """Returns the runs of all seeds with the best setting."""
        length, best = arm.lengths[len(arm.lengths) // 2], None
        for rate in arm.rates:
            run = self.get(arm, (rate, length), SEEDS[0], best)
            if best is None or run.order() < best.order():
                best = run
        for length in arm.lengths:
            runs = []
            for seed in SEEDS:
                runs.append(self.get(arm, (best.rate, length), seed))
                if not np.isfinite(runs[-1].reached()[0]):
                    break
            else:
                return runs
        raise ValueError(f"{arm.name}: not all seeds come to {TARGET}.")


def summary(values) -> str:
    """Returns the mean of values, and their range."""
    return f"{np.mean(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def print_table(results: list[list[Run]]) -> None:
    """Prints rows and updates to the target, over the seeds."""
    print(f"{'':12}{'rate':>6}{'of rows':>9}{'rows':>27}{'updates':>24}")
    for runs in results:
        rows, updates = zip(*(run.reached() for run in runs), strict=True)
        length = "" if runs[0].rows == MOST else f"{runs[0].rows:,}"
        print(
            f"{runs[0].name:12}{runs[0].rate:6}{length:>9}"
            f"{summary(rows):>27}{summary(updates):>24}"
        )


def draw(results: list[list[Run]], path: str) -> None:
    """Draws the losses over rows and over updates, a line for each seed."""
    picture = figure.Figure(figsize=(9, 4), dpi=150, layout="constrained")
    panels = picture.subplots(1, 2, sharey=True)
    for runs, color in zip(results, COLORS, strict=False):
        for run in runs:
            rows = EVERY * np.arange(1, len(run.losses) + 1)
            label = run.name if run is runs[0] else None
            for axes, x in zip(panels, (rows, run.updates), strict=True):
                axes.plot(x, run.losses, color=color, lw=1, label=label)
    for axes, name in zip(panels, ("rows", "updates"), strict=True):
        axes.axhline(TARGET, color="#7F7F7F", lw=0.7, ls="--")
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    panels[0].set_ylim(TARGET - 0.05, 2.4)
    panels[1].set_xscale("log")
    panels[0].set_ylabel("held-out loss, nats per byte")
    panels[0].legend(frameon=False)
    picture.savefig(path)


def main(argv: list[str]) -> None:
    """Trains, prints the table and draws the picture."""
    del argv
    tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
    tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
    runs = Runs(_RESULTS.value)
    results = [runs.tuned(arm) for arm in fixed_arms()]
    rows = [np.mean([run.reached()[0] for run in each]) for each in results]
    best = list(RATES)[int(np.argmin(rows))]
    results += [runs.tuned(arm) for arm in [*other_arms(best), noise_arm()]]
    print_table(results)
    if _PICTURE.value is not None:
        draw(results, _PICTURE.value)


if __name__ == "__main__":
    app.run(main)
