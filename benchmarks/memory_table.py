"""The memory of a training, in bytes for each parameter.

    python -m benchmarks.memory_table

It prints the four tables of `docs/choosing.md`; `--page` writes them there.
Two are of what stays from step to step: variables, whose bytes are counted in a
model that has trained. The third is of what comes and goes: what XLA plans for
each program of a window.
`tests/memory_table_test.py` compares the first two with the page, and the third
in the thorough tests. All is of one replica.

The model of the third is a stack of dense layers that are all alike, and the
batch is small: activations take next to nothing.

What TensorFlow takes without XLA is not known before it runs. The fourth table
is what its allocator had at most in a window, beyond what it had before. That
depends a little on the order in which threads run. A process may have more: the
allocator takes memory from the system in large regions, and keeps it.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

import keras_accum
from keras_accum import boundary
from keras_accum import compat
from keras_accum import counting
from keras_accum import replicas
from keras_accum import steps

ROOT = pathlib.Path(__file__).absolute().parent.parent
PAGE = ROOT / "docs" / "choosing.md"
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "bfloat16")
OPTIMIZERS: dict[str, Callable[..., keras.Optimizer]] = {
    "`SGD`": keras.optimizers.SGD,
    "`SGD(momentum=0.9)`": lambda **own: keras.optimizers.SGD(
        momentum=0.9, **own
    ),
    "`RMSprop`": keras.optimizers.RMSprop,
    "`Adam`": keras.optimizers.Adam,
    "`AdamW`": keras.optimizers.AdamW,
    "`Adam(amsgrad=True)`": lambda **own: keras.optimizers.Adam(
        amsgrad=True, **own
    ),
    "`Adam(use_ema=True)`": lambda **own: keras.optimizers.Adam(
        use_ema=True, **own
    ),
    "`Lion`": keras.optimizers.Lion,
    "`Adafactor`": keras.optimizers.Adafactor,
}
STEPS = 4
# What a model is made with, by what the table calls it.
WAYS: dict[str, dict] = {
    "`keras.Model`": {},
    "`keras.Model`, `gradient_accumulation_steps` of the optimizer": {
        "gradient_accumulation_steps": STEPS
    },
    "`accum_steps=1`": {"accum_steps": 1},
    "`accum_steps=4`": {"accum_steps": STEPS},
    "`effective_batch_size`": {"effective_batch_size": 32},
    "`microbatch_size`": {"microbatch_size": 32 // STEPS},
    '`accum_steps=4, accumulator_dtype="bfloat16"`': {
        "accum_steps": STEPS,
        "accumulator_dtype": "bfloat16",
    },
    '`accum_steps=4, accumulator_dtype="float64"`': {
        "accum_steps": STEPS,
        "accumulator_dtype": "float64",
    },
}
# The ways whose transient memory is measured.
MEASURED = (
    "`keras.Model`",
    "`keras.Model`, `gradient_accumulation_steps` of the optimizer",
    "`accum_steps=4`",
    "`microbatch_size`",
)
ROWS = 8
# Units and layers, of models whose peak memory is measured.
WIDTH, DEPTH = 1024, 8

# What the update's cell has where a step is a micro-batch and an update.
IN_STEP = "in the step"

_PAGE = flags.DEFINE_bool("page", False, "Whether to write the page.")


@dataclasses.dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        way: A key of `WAYS`.
        optimizer: A key of `OPTIMIZERS`.
        policy: The dtype policy of the layers.
        jit_compile: Whether XLA compiles.
        replicas: How many replicas there are.
        run_eagerly: Whether nothing is traced.
        width: Units of each layer.
        depth: Layers.
    """

    way: str = "`keras.Model`"
    optimizer: str = "`Adam`"
    policy: str = "float32"
    jit_compile: bool = False
    replicas: int = 1
    run_eagerly: bool = False
    width: int = 512
    depth: int = 2


def compiled(case: Case) -> keras.Model:
    """Returns the model of a case."""
    arguments = dict(WAYS[case.way])
    accumulates = arguments.pop("gradient_accumulation_steps", None)
    own = {"gradient_accumulation_steps": accumulates} if accumulates else {}
    cls = keras_accum.GradientAccumulationModel if arguments else keras.Model
    x = inputs = keras.Input((case.width,))
    for _ in range(case.depth):
        x = keras.layers.Dense(case.width, "tanh", dtype=case.policy)(x)
    model = cls(inputs, x, **arguments)
    model.compile(
        OPTIMIZERS[case.optimizer](**own),
        loss="mse",
        jit_compile=case.jit_compile,
        run_eagerly=case.run_eagerly,
    )
    return model


def train(case: Case, model: keras.Model) -> None:
    """Makes one update: of 4 micro-batches, or plain Keras's of one."""
    rows = ROWS * case.replicas
    window = rows if case.way == "`keras.Model`" else STEPS * rows
    if "accum_steps=1`" in case.way:
        window = rows
    batch = window if "microbatch_size" in WAYS[case.way] else rows
    x = np.zeros((window, case.width), "float32")
    model.fit(x, x, batch_size=batch, verbose=0)


def trained(case: Case) -> keras.Model:
    """Returns the model of a case, with all the variables that it makes."""
    # They are the same, and there is nothing to trace.
    case = dataclasses.replace(case, run_eagerly=True)
    model = compiled(case)
    train(case, model)
    return model


def persistent(model: keras.Model) -> dict[str, float]:
    """Returns the bytes for each parameter of a model that has trained.

    Returns:
        Those of its "weights", of the "buffers" that gradients are added up
        in, and of all else that the optimizer has: its "moments".
    """
    parameters = model.count_params()
    optimizer = model.optimizer
    # One that scales the loss has another one inside.
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    buffers = list(getattr(inner, "_accumulated_gradients", ()))
    mine = {id(each) for each in buffers}
    moments = [each for each in optimizer.variables if id(each) not in mine]
    if isinstance(model, keras_accum.GradientAccumulationModel):
        buffers += model._accumulation.window["gradients"].variables
    return {
        "weights": counting.bytes_of(model.weights) / parameters,
        "buffers": counting.bytes_of(buffers) / parameters,
        "moments": counting.bytes_of(moments) / parameters,
    }


def figure(value: float) -> str:
    """Writes bytes for each parameter in two digits behind the point."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a Markdown table: first a column of text, then numbers."""
    return [
        f"| {' | '.join(cells)} |"
        for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    ]


def policy_head(first: str) -> list[str]:
    """Returns the head of a table with a column for each policy."""
    return [first, *(f"`{policy}`" for policy in POLICIES)]


def moments_table() -> list[str]:
    """Returns the table of the weights and the optimizers' moments."""
    rows: dict[str, list[str]] = {"the weights, with any optimizer": []}
    for policy in POLICIES:
        for name in OPTIMIZERS:
            found = persistent(trained(Case(optimizer=name, policy=policy)))
            cells = rows.setdefault(f"moments of {name}", [])
            cells.append(figure(found["moments"]))
        rows["the weights, with any optimizer"].append(figure(found["weights"]))
    return table(
        policy_head("what stays"),
        [[name, *cells] for name, cells in rows.items()],
    )


def buffers_table() -> list[str]:
    """Returns the table of the buffers of each way to accumulate."""
    rows = []
    for way in WAYS:
        found = [
            persistent(trained(Case(way, policy=policy)))["buffers"]
            for policy in POLICIES
        ]
        rows.append([way, *map(figure, found)])
    return table(policy_head("buffers"), rows)


def split_cpu(replicas: int) -> tf.distribute.Strategy:
    """Returns a strategy of that many replicas on the CPU.

    TensorFlow splits it once in a process.
    """
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    return tf.distribute.MirroredStrategy()


def transient(case: Case, strategy: tf.distribute.Strategy) -> dict:
    """Returns the bytes for each parameter that the programs of a window take.

    Args:
        case: The training, compiled by XLA.
        strategy: Where it trains.

    Returns:
        Those that XLA plans for a "step", which is a micro-batch or, in
        `keras.Model`, also an update; and for the "update", unless the step has
        it.
    """
    with strategy.scope():
        model = compiled(case)
    x = tf.zeros((ROWS, case.width))
    if WAYS[case.way].keys() <= {"gradient_accumulation_steps"}:
        model.optimizer.build(model.trainable_variables)
        found = {"step": planned(model.train_step, (x, x))}
    else:
        # Makes all variables.
        train(case, model)
        window = model._accumulation.window
        step = functools.partial(
            steps.train_microbatch, model._accumulation, None
        )
        if not replicas.has_several(strategy):
            found = {
                "step": planned(step, (x, x)),
                "update": planned(model.update_step),
            }
        else:
            found = of_first(strategy, lambda: {"step": planned(step, (x, x))})
            # As in `boundary.make_update`.
            sums = boundary.sum_in_place(strategy, window)
            end = functools.partial(boundary.end_window, model, window)
            found |= of_first(
                strategy, lambda total: {"update": planned(end, total)}, sums
            )
    return {name: size / model.count_params() for name, size in found.items()}


def of_first(strategy: tf.distribute.Strategy, function: Callable, *args):
    """Returns what a function returns on the first replica."""
    results = []
    # `run` makes tensors of what it returns.
    strategy.run(lambda *local: results.append(function(*local)), args=args)
    return results[0]


def planned(step: Callable, *args) -> int:
    """Returns the bytes that XLA plans for a call."""
    program = tf.function(step, jit_compile=True, autograph=False)
    return compat.planned_bytes(program, *args)


def transient_table(
    strategy: tf.distribute.Strategy | None = None,
) -> list[str]:
    """Returns the table of what comes and goes within a window.

    Args:
        strategy: One of two replicas; None splits the CPU.
    """
    strategy = strategy or split_cpu(2)
    rows = []
    for way in MEASURED:
        case = Case(way, jit_compile=True, width=WIDTH, depth=DEPTH)
        one = transient(case, tf.distribute.get_strategy())
        cells = [
            f"{one[name]:.1f}" if name in one else IN_STEP
            for name in ("step", "update")
        ]
        if "update" in one:
            case = dataclasses.replace(case, replicas=2)
            two = transient(case, strategy)
            cells += [f"{two[name]:.1f}" for name in ("step", "update")]
        else:
            # Keras fails with XLA on two replicas, and where it accumulates.
            cells += ["error"] * 2
        rows.append([way, *cells])
    return table(
        [
            "comes and goes, with XLA",
            "micro-batch",
            "update",
            "2 replicas: micro-batch",
            "2 replicas: update",
        ],
        rows,
    )


def peak(case: Case) -> float:
    """Returns the bytes for each parameter that come and go in a window."""
    model = compiled(case)
    for _ in range(2):
        # Makes all variables, and traces.
        train(case, model)
    taken = counting.counted_bytes(train, case, model)
    return taken / model.count_params()


def peaks_table() -> list[str]:
    """Returns the table of what comes and goes without XLA."""
    optimizers = ("`SGD`", "`SGD(momentum=0.9)`", "`Adam`")
    rows = []
    for way in MEASURED:
        cases = [
            Case(way, optimizer, width=WIDTH, depth=DEPTH)
            for optimizer in optimizers
        ]
        rows.append([way, *(f"{peak(case):.1f}" for case in cases)])
    return table(["comes and goes, without XLA", *optimizers], rows)


def marked(name: str, lines: list[str]) -> str:
    """Returns a table between the marks that the page has around it."""
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    return "\n".join([begin, *lines, end])


def with_table(page: str, name: str, lines: list[str]) -> str:
    """Returns the page, with this table between its marks."""
    begin, _, end = marked(name, [""]).split("\n")
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    return re.sub(pattern, lambda _: marked(name, lines), page, flags=re.DOTALL)


TABLES = {
    "moments": moments_table,
    "buffers": buffers_table,
    "transient": transient_table,
    "peaks": peaks_table,
}


def main(argv: list[str]) -> None:
    """Prints the tables."""
    del argv
    strategy = split_cpu(2)
    for name, make in TABLES.items():
        lines = make(strategy) if name == "transient" else make()
        print("\n".join([*lines, ""]), flush=True)
        if _PAGE.value:
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(with_table(page, name, lines), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
