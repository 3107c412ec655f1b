"""Where the loop over micro-batches stands best, and where its sums live.

    python -m benchmarks.loop_forms

A whole batch of k micro-batches, all at hand, is trained on with one update, in
plain TensorFlow and without this library, in four forms:

* host, variables: a `tf.while_loop` on the host around compiled micro-steps.
  The first assigns its gradients to variables, the further ones add, a third
  program updates.
* host, carried: the same, but the micro-steps take the sums and return them.
* program, variables: one compiled program, the loop in it, sums in variables.
* program, carried: one compiled program, whose loop carries the sums.

After one batch all must have the same weights. They are timed in turn, and the
figures to quote are the ratios. Medians of 21 rounds (convolutional: 8), each
over the first form, on two busy cores, with TensorFlow 2.21.0 and Keras 3.15.1:

                        MLP   transformer  convolutional
    host, variables     1.00     1.00           1.00
    host, carried       1.01     1.02           1.00
    program, variables  0.97     0.97          11.2
    program, carried    0.96     0.94          11.6

The middle half of the rounds is about 0.05 to either side, of the convolutional
model more. XLA on a CPU runs convolutions in a loop without its fast kernels.

Then, what XLA plans for the program with the gradients, scratch and new
outputs, in MB, for batches of 4 and of 32 micro-batches, which take the same:

                        MLP   transformer  convolutional
    host, variables     16.9     26.7          27.3
    host, carried       35.2     36.9          27.8
    program, variables  16.9     26.7          27.3
    program, carried    52.0     38.6          31.4

The sums are P bytes: 35.1, 11.9 and 4.1 MB. Where they are variables, P comes
on top and stays between steps; with "host, carried" P comes on top for the
sums that go in. So the first, third and last form take the same at their
peak, and "host, carried" up to P more. Between steps the carried forms hold P
less.

The peak memory of a process that trains the MLP, compiling included, over that
of the first form, medians of three: 29, 42 and 45 MB of 981. With layers twice
as wide, P = 123 MB, it was 99, 23 and 36 MB, one process each: in the forms
with one program what does not grow with the model, and so is no copy of the
sums. The host's carried sums do cost one.

What follows: on a CPU the loop belongs on the host, with the sums in variables.
One program saves 3 to 6 in 100, and no memory, and may cost eleven times the
time. "host, carried" is never better. On a device whose compiler keeps its fast
kernels in loops, "program, carried" holds P less from step to step.
"""

import functools
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags
from tensorflow.compiler.xla.service import hlo_pb2

from benchmarks import window_time

IMAGE = (32, 32, 3)
TOKENS, VOCABULARY, WIDTH, HEADS, BLOCKS = 64, 3072, 192, 4, 4
# Batches whose programs are planned, in micro-batches.
PLANNED_STEPS = (1, 4, 32)
# Processes whose memory is measured, for each form.
PROCESSES = 3

FLAGS = flags.FLAGS
_FORM = flags.DEFINE_string(
    "form", None, "Only train in this form, and print the memory that it took."
)


def decoder() -> tuple[keras.Model, keras.Optimizer]:
    """Returns a decoder-only transformer of 3.0 million parameters."""
    tokens = keras.Input((TOKENS,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for _ in range(BLOCKS):
        normal = keras.layers.LayerNormalization()(hidden)
        hidden += keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(
            normal, normal, use_causal_mask=True
        )
        normal = keras.layers.LayerNormalization()(hidden)
        wide = keras.layers.Dense(4 * WIDTH, activation="gelu")(normal)
        hidden += keras.layers.Dense(WIDTH)(wide)
    normal = keras.layers.LayerNormalization()(hidden)
    logits = keras.layers.Dense(VOCABULARY)(normal)
    return keras.Model(tokens, logits), keras.optimizers.Adam(1e-4)


def convolutional() -> tuple[keras.Model, keras.Optimizer]:
    """Returns an image classifier of 1.0 million parameters."""
    inputs = keras.Input(IMAGE)
    hidden = inputs
    for filters in (64, 128, 256):
        hidden = keras.layers.Conv2D(
            filters, 3, padding="same", activation="relu"
        )(hidden)
        hidden = keras.layers.MaxPooling2D()(hidden)
    hidden = keras.layers.Flatten()(hidden)
    hidden = keras.layers.Dense(160, activation="relu")(hidden)
    outputs = keras.layers.Dense(window_time.CLASSES)(hidden)
    return keras.Model(inputs, outputs), keras.optimizers.SGD(0.01)


def multilayer_perceptron() -> tuple[keras.Model, keras.Optimizer]:
    """Returns the model of `benchmarks.window_time`: 8.8 million parameters."""
    model = window_time.multilayer_perceptron(keras.Model)
    return model, keras.optimizers.Adam(1e-4)


def vectors(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Returns a batch for `multilayer_perceptron`."""
    x = rng.normal(size=(rows, window_time.FEATURES)).astype("float32")
    return x, rng.integers(0, window_time.CLASSES, rows)


def texts(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Returns a batch for `decoder`."""
    tokens = rng.integers(0, VOCABULARY, (rows, TOKENS + 1), "int32")
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def images(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Returns a batch for `convolutional`."""
    x = rng.normal(size=(rows, *IMAGE)).astype("float32")
    return x, rng.integers(0, window_time.CLASSES, rows)


class Recipe(NamedTuple):
    """What to train: rows of a micro-batch, micro-batches, rounds to time."""

    build: Callable[[], tuple[keras.Model, keras.Optimizer]]
    batch: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    rows: int
    steps: int
    # In one program the third takes 10 to 25 times as long as the others.
    share_of_rounds: float = 1.0


RECIPES = {
    "MLP": Recipe(multilayer_perceptron, vectors, 4, 8),
    "transformer": Recipe(decoder, texts, 4, 8),
    "convolutional": Recipe(convolutional, images, 8, 4, 0.4),
}


class Training:
    """A model, and the steps that all forms are made of.

    Args:
        recipe: What to train.
        steps: Micro-batches of the whole batch.
    """

    def __init__(self, recipe: Recipe, steps: int):
        keras.utils.set_random_seed(0)
        self.steps = steps
        self.model, self.optimizer = recipe.build()
        self.optimizer.build(self.variables)
        self._loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
        rng = np.random.default_rng(0)
        self.batch = tuple(
            map(tf.constant, recipe.batch(rng, steps * recipe.rows))
        )

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that are trained."""
        return self.model.trainable_variables

    def zeros(self) -> list[tf.Tensor]:
        """Returns a zero for each weight: what the sums begin with."""
        return [tf.zeros(v.shape, v.dtype) for v in self.variables]

    def buffers(self) -> list[tf.Variable]:
        """Returns a variable for each weight, for the sum of its gradients."""
        return [tf.Variable(zero) for zero in self.zeros()]

    def gradients(self, x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        """Returns the gradients of the mean loss of a micro-batch."""
        with tf.GradientTape() as tape:
            loss = self._loss(y, self.model(x, training=True))
        gradients = tape.gradient(loss, self.variables)
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    def added(self, sums, x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        """Returns the sums with the gradients of one more micro-batch."""
        gradients = self.gradients(x, y)
        return [s + g for s, g in zip(sums, gradients, strict=True)]

    def update(self, sums) -> None:
        """Updates the weights with the mean of the gradients."""
        means = [s / self.steps for s in sums]
        self.optimizer.apply(means, self.variables)

    def split(self, batch) -> list[tf.Tensor]:
        """Splits the whole batch: its micro-batches along a new first axis."""
        return [
            tf.reshape(array, (self.steps, -1, *array.shape[1:]))
            for array in batch
        ]

    def loop(self, body: Callable, start: int, *carried):
        """Calls `carried = body(index, *carried)` for each micro-batch."""
        return tf.while_loop(
            lambda index, *carried: index < self.steps,
            lambda index, *carried: (index + 1, *body(index, *carried)),
            (start, *carried),
            parallel_iterations=1,
        )[1:]


class Form(NamedTuple):
    """A way to train on a whole batch.

    Attributes:
        window: Trains on the whole batch `x`, `y`, with one update.
        program: The compiled program that has the gradients in it.
        program_batch: What `program` takes of the whole batch, and more.
    """

    window: tf.types.experimental.PolymorphicFunction
    program: tf.types.experimental.PolymorphicFunction
    program_batch: Callable[..., tuple]


def host_variables(training: Training) -> Form:
    """Returns the loop around compiled micro-steps, the sums in variables."""
    buffers = training.buffers()

    @tf.function(jit_compile=True)
    def first(x, y):
        gradients = training.gradients(x, y)
        for buffer, gradient in zip(buffers, gradients, strict=True):
            buffer.assign(gradient)

    @tf.function(jit_compile=True)
    def add(x, y):
        gradients = training.gradients(x, y)
        for buffer, gradient in zip(buffers, gradients, strict=True):
            buffer.assign_add(gradient)

    @tf.function(jit_compile=True)
    def update():
        training.update(buffers)

    @tf.function(autograph=False)
    def window(*batch):
        x, y = training.split(batch)

        def body(index):
            add(x[index], y[index])
            return ()

        first(x[0], y[0])
        training.loop(body, 1)
        update()

    def one_microbatch(x, y):
        return x[: len(x) // training.steps], y[: len(y) // training.steps]

    return Form(window, add, one_microbatch)


def host_carried(training: Training) -> Form:
    """Returns the loop around compiled micro-steps that return the sums."""
    first = tf.function(training.gradients, jit_compile=True)
    update = tf.function(training.update, jit_compile=True)

    @tf.function(jit_compile=True)
    def add(x, y, *sums):
        return training.added(sums, x, y)

    @tf.function(autograph=False)
    def window(*batch):
        x, y = training.split(batch)
        sums = training.loop(
            lambda index, *sums: add(x[index], y[index], *sums),
            1,
            *first(x[0], y[0]),
        )
        update(list(sums))

    def one_microbatch(x, y):
        rows = len(x) // training.steps
        return x[:rows], y[:rows], *training.zeros()

    return Form(window, add, one_microbatch)


def program_variables(training: Training) -> Form:
    """Returns one program with the loop in it, the sums in variables."""
    buffers = training.buffers()

    @tf.function(autograph=False, jit_compile=True)
    def window(*batch):
        x, y = training.split(batch)

        def body(index):
            gradients = training.gradients(x[index], y[index])
            for buffer, gradient in zip(buffers, gradients, strict=True):
                buffer.assign_add(gradient)
            return ()

        for buffer, zero in zip(buffers, training.zeros(), strict=True):
            buffer.assign(zero)
        training.loop(body, 0)
        training.update(buffers)

    return Form(window, window, lambda *batch: batch)


def program_carried(training: Training) -> Form:
    """Returns one program with the loop in it, which carries the sums."""

    @tf.function(autograph=False, jit_compile=True)
    def window(*batch):
        x, y = training.split(batch)
        sums = training.loop(
            lambda index, *sums: training.added(sums, x[index], y[index]),
            0,
            *training.zeros(),
        )
        training.update(sums)

    return Form(window, window, lambda *batch: batch)


FORMS = {
    "host, variables": host_variables,
    "host, carried": host_carried,
    "program, variables": program_variables,
    "program, carried": program_carried,
}
BASE = next(iter(FORMS))


def contestants(recipe: Recipe) -> dict[str, Callable[[], None]]:
    """Returns by name a function that trains on one whole batch.

    Raises:
        AssertionError: After a first batch, a form has other weights.
    """
    functions, weights = {}, {}
    for name, make in FORMS.items():
        training = Training(recipe, recipe.steps)
        before = training.model.get_weights()
        functions[name] = functools.partial(
            make(training).window, *training.batch
        )
        functions[name]()
        weights[name] = training.model.get_weights()
    step = largest_difference(weights[BASE], before)
    for each in weights.values():
        # The order of the sums is the same, so only rounding may differ.
        assert largest_difference(each, weights[BASE]) < step / 100
    return functions


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Returns the largest difference between two lists of arrays."""
    pairs = zip(one, other, strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


def print_times(name: str, recipe: Recipe) -> None:
    """Prints the times of the forms, and their ratios to the first."""
    print(f"\n{name:20}{'median ms':>10}  / {BASE}")
    measured = window_time.in_turn(
        contestants(recipe), round(FLAGS.rounds * recipe.share_of_rounds)
    )
    for form, each in measured.items():
        median = 1e3 * statistics.median(each)
        ratio = window_time.ratio(measured, form, BASE)
        print(f"{form:20}{median:10.1f}  {ratio}", flush=True)


def planned_bytes(form: Form, batch: tuple[tf.Tensor, ...]) -> int:
    """Returns the bytes that a program takes beyond arguments and constants."""
    arguments = form.program_batch(*batch)
    hlo = hlo_pb2.HloProto.FromString(
        form.program.experimental_get_compiler_ir(*arguments)(
            stage="optimized_hlo_proto_serialized"
        )
    )
    return sum(
        allocation.size
        for allocation in hlo.buffer_assignment.buffer_allocations
        if not (
            allocation.is_entry_computation_parameter
            or allocation.is_constant
            or allocation.is_thread_local
        )
    )


def print_plans(name: str, recipe: Recipe) -> None:
    """Prints what XLA plans for each form, for several sizes of the batch."""
    header = "".join(f"{f'{steps} m':>10}" for steps in PLANNED_STEPS)
    print(f"\n{name + ', planned MB':28}{header}")
    for form, make in FORMS.items():
        line = ""
        for steps in PLANNED_STEPS:
            training = Training(recipe, steps)
            size = planned_bytes(make(training), training.batch)
            line += f"{size / 1e6:10.2f}"
        print(f"{form:28}{line}", flush=True)


def train_and_print_memory(form: str) -> None:
    """Trains the MLP in one form, and prints the process's peak memory, MB."""
    recipe = RECIPES["MLP"]
    training = Training(recipe, recipe.steps)
    window = FORMS[form](training).window
    for _ in range(3):
        window(*training.batch)
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6)


def peak_megabytes(form: str) -> float:
    """Returns the peak memory of a process that trains the MLP in one form."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.loop_forms", f"--form={form}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    return float(result.stdout)


def print_memory() -> None:
    """Prints what the MLP takes in each form, over what the first takes."""
    peaks = {name: [] for name in FORMS}
    for _ in range(PROCESSES):
        for name in FORMS:
            peaks[name].append(peak_megabytes(name))
    base = statistics.median(peaks[BASE])
    print(f"\n{'MLP, resident MB':20}{'median':>10}  - {BASE}")
    for name, each in peaks.items():
        median = statistics.median(each)
        print(f"{name:20}{median:10.0f}  {median - base:.0f}", flush=True)


def main(argv):
    """Prints times, plans and memory."""
    del argv
    if sys.platform != "linux":
        sys.exit("It needs Linux, whose processes say what memory they took.")
    if _FORM.value:
        train_and_print_memory(_FORM.value)
        return
    for name, recipe in RECIPES.items():
        print_times(name, recipe)
        print_plans(name, recipe)
    print_memory()


if __name__ == "__main__":
    app.run(main)
