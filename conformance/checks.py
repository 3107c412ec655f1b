"""The checks: each a claim in a line, a figure that is measured, and a bound.

`weights`, the figure of most, is the distance between the weights and those of
the large batch, over the distance that the large batch moved them: 2-norms over
all weights, after the last epoch.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from conformance import problems
from conformance.problems import Problem
from conformance.system import DoesNotApply
from conformance.system import Outcome
from conformance.system import System

# Float32 has a relative rounding error of 6e-8. A few updates of a few hundred
# weights stay below this; the faults that are looked for are above 1e-2.
ROUNDING = 1e-4

Measure = Callable[[System, Problem], float]


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        topic: Which part of the table it stands in.
        claim: What is true of a system that passes.
        problem: What is trained.
        bound: The most that the figure may be.
        measure: Returns the figure, of a system and the problem.
    """

    topic: str
    claim: str
    problem: Problem
    bound: float = ROUNDING
    measure: Measure | None = None

    def figure(self, system: System) -> float:
        """Returns what is measured; infinite if it is not finite."""
        figure = (self.measure or weights)(system, self.problem)
        return float(figure) if math.isfinite(figure) else math.inf


def norm(arrays) -> float:
    """Returns the 2-norm over all arrays."""
    return math.sqrt(
        sum(float(np.sum(np.square(a, dtype="float64"))) for a in arrays)
    )


def relative(actual: dict, expected: dict, initial: dict) -> float:
    """Returns the distance to `expected`, over how far that was moved."""
    away = norm([actual[name] - expected[name] for name in expected])
    return away / norm([expected[name] - initial[name] for name in expected])


def weights(system: System, problem: Problem) -> float:
    """Returns the figure of most checks; see the module."""
    initial = problems.initial_weights(problem.model)
    expected = system.plain(problem).weights
    return relative(system.accumulated(problem).weights, expected, initial)


def weights_of_float32(system: System, problem: Problem) -> float:
    """Measures as `weights` does, but the large batch is trained on in float32.

    In fewer bits the large batch's own gradient is a sum with errors.
    """
    initial = problems.initial_weights(problem.model)
    wide = dataclasses.replace(problem, dtype="float32")
    expected = system.plain(wide).weights
    return relative(system.accumulated(problem).weights, expected, initial)


def averages(system: System, problem: Problem) -> float:
    """Measures as `weights` does, of the moving averages."""
    initial = problems.initial_weights(problem.model)
    expected = system.plain(problem).averages
    return relative(system.accumulated(problem).averages, expected, initial)


def weights_of_dense(system: System, problem: Problem) -> float:
    """Measures as `weights` does, but the large batch looks nothing up.

    Its embedding is multiplied with one-hot vectors. A row that occurs several
    times then has one gradient, whose square is what the formulas of Adam and
    its kin mean. Keras's optimizers square the gradients of lookups one by one.
    """
    initial = problems.initial_weights(problem.model)
    dense = dataclasses.replace(problem, lookup=False)
    expected = system.plain(dense).weights
    return relative(system.accumulated(problem).weights, expected, initial)


def power_vector(system: System, problem: Problem) -> float:
    """Returns the distance of the vectors of power iterations, of norm 1."""
    expected = system.plain(problem).power_vector
    return norm([system.accumulated(problem).power_vector - expected])


def moving_mean(system: System, problem: Problem) -> float:
    """Returns the distance of the moving means, over that from 0."""
    expected = system.plain(problem).moving_mean
    actual = existing(system.accumulated(problem).moving_mean)
    return norm([actual - expected]) / norm([expected])


def moving_variance(system: System, problem: Problem) -> float:
    """Returns the distance of the moving variances, over that from 1."""
    expected = system.plain(problem).moving_variance
    actual = existing(system.accumulated(problem).moving_variance)
    return norm([actual - expected]) / norm([expected - 1])


def updates(system: System, problem: Problem) -> float:
    """Returns how far the optimizer's count is from the number of windows."""
    expected = sum(len(windows) for windows in problem.windows())
    return abs(existing(system.accumulated(problem).updates) - expected)


def loss(system: System, problem: Problem) -> float:
    """Returns the largest relative error of a reported loss."""
    actual = existing(system.accumulated(problem).losses)
    expected = existing(system.plain(problem).losses)
    pairs = zip(actual, expected, strict=True)
    return max(abs(a - e) / abs(e) for a, e in pairs)


def differing(one: Outcome, other: Outcome) -> int:
    """Counts the weights that are not the same, to the bit."""
    return sum(
        int(np.sum(one.weights[name] != other.weights[name]))
        for name in one.weights
    )


def bits_of_plain(system: System, problem: Problem) -> float:
    """Counts weights that differ from a training's without accumulation."""
    return differing(system.accumulated(problem), system.plain(problem))


def bits_of_repeated(system: System, problem: Problem) -> float:
    """Counts weights that differ from those of the same run, repeated."""
    return differing(system.accumulated(problem), system.accumulated(problem))


def bits_of_resumed(system: System, problem: Problem) -> float:
    """Counts weights that differ from those of the uninterrupted run."""
    whole = dataclasses.replace(problem, resume_after=None)
    return differing(system.accumulated(problem), system.accumulated(whole))


def alike_masks(system: System, problem: Problem) -> float:
    """Returns the share of units that all micro-batches drop, or none does.

    From weights of zero and inputs of one, the gradient of a unit's weight is
    proportional to how many of the micro-batches kept it.
    """
    moved = system.accumulated(problem).weights["output_kernel"]
    share = np.abs(moved) / np.max(np.abs(moved))
    return float(np.mean((share < 1e-3) | (share > 1 - 1e-3)))


def existing(value):
    """Returns `value`; raises if there is none."""
    if value is None:
        raise DoesNotApply("The system keeps no such figure; the user does.")
    return value


def all_checks() -> list[Check]:
    """Returns the checks, in the order of the table."""
    replace = dataclasses.replace
    equal = Problem(problems.vectors(8, 8, 8, 8))
    uneven = Problem(problems.vectors(9, 9, 9, 1))
    tagger = {"model": "tagger", "learning_rate": 1.0}
    tokens = Problem(problems.sequences(12, 12, 12, 12), **tagger)
    masked = Problem(problems.sequences(12, 3, 2, 1), **tagger)
    weighted = Problem(problems.weighted(problems.vectors(4, 4, 4, 4)))
    seven = Problem(problems.vectors(*[8] * 7, epochs=2))
    clipped = replace(equal, learning_rate=1.0)
    six = Problem(problems.vectors(*[4] * 4, epochs=6))
    spoiled = Problem(problems.poisoned(problems.vectors(8, 8, 8, 8), 1))
    normalized = replace(equal, model="normalized")
    rows_and_tokens = replace(
        masked,
        epochs=problems.with_row_labels(masked.epochs),
        model="two_losses",
    )
    pair = replace(
        equal,
        model="pair",
        step="two_optimizers",
        optimizer="adam",
        learning_rate=0.01,
    )
    dropped = Problem(problems.ones(1, 4), model="dropout", learning_rate=1.0)
    two = replace(equal, replicas=2)
    lopsided = Problem(
        problems.halves((12, 2), (3, 9), (1, 1), (12, 4)),
        replicas=2,
        **tagger,
    )
    groups = {
        "Weighting": [
            ("Micro-batches of 8, 8, 8 and 8 rows", equal),
            ("Micro-batches of 9, 9, 9 and 1 rows", uneven),
            (
                "Micro-batches of 1, 15, 2 and 30 rows",
                Problem(problems.vectors(1, 15, 2, 30)),
            ),
            ("Masked tokens: 12, 3, 2 and 1 of 12 count", masked),
            (
                "Masked tokens: none of a micro-batch count",
                Problem(problems.sequences(12, 0, 6, 3), **tagger),
            ),
            ("Weights of rows, mean over the rows", weighted),
            (
                "Weights of rows, mean over the sum of the weights",
                replace(weighted, reduction="weighted_mean"),
            ),
            ("A loss that is a sum", replace(equal, reduction="sum")),
            (
                "A loss that is a sum, with weights of rows",
                replace(weighted, reduction="sum"),
            ),
            (
                "Two losses: a mean over rows, one over tokens that count",
                rows_and_tokens,
            ),
            (
                "A function of the batch: the mean over tokens that count",
                Problem(
                    problems.sequences(2, 12, 1, 6),
                    is_scalar_function=True,
                    **tagger,
                ),
            ),
            (
                "A contrastive loss between the rows of the batch",
                replace(equal, model="towers"),
            ),
        ],
        "Added losses": [
            (
                "A layer adds a mean over the rows, over uneven sizes",
                replace(uneven, added="row_mean", added_scale=0.5),
            ),
            (
                "A layer adds a value per row: a sum, beside a mean",
                replace(uneven, added="per_row", added_scale=0.05),
            ),
            (
                "A layer adds a loss that balances: it couples rows",
                replace(equal, added="balance", added_scale=2.0),
            ),
        ],
        "Regularizers": [
            ("L2, with a mean", replace(equal, l2=0.05)),
            (
                "L2, with a sum: it counts once per update",
                replace(equal, l2=0.5, reduction="sum", learning_rate=0.01),
            ),
            (
                "A penalty on activations, over uneven sizes",
                replace(uneven, activity_l2=0.05),
            ),
            (
                "Decoupled weight decay, once per update",
                replace(equal, optimizer="adamw", learning_rate=0.01),
            ),
        ],
        "Last windows": [
            ("7 micro-batches an epoch, k = 4", seven),
            (
                "7 micro-batches an epoch, k = 16",
                replace(seven, accum_steps=16),
            ),
            (
                "An epoch's last micro-batch is short",
                Problem(problems.vectors(8, 8, 8, 8, 8, 3), accum_steps=4),
            ),
            (
                "The optimizer counts each window as one update",
                replace(seven, optimizer="adam", learning_rate=0.01),
                0,
                updates,
            ),
        ],
        "Optimizer": [
            ("Momentum", replace(equal, optimizer="momentum")),
            (
                "Adam",
                replace(equal, optimizer="adam", learning_rate=0.01),
            ),
            (
                "Clipping by the norm sees the window's gradient",
                replace(clipped, clip_norm=0.1),
            ),
            (
                "Clipping by value sees the window's gradient",
                replace(clipped, clip_value=0.02),
            ),
            (
                "A learning-rate schedule counts updates",
                replace(six, halving=True),
            ),
            (
                "A moving average of the weights sees updates",
                replace(six, average=0.9),
                ROUNDING,
                averages,
            ),
            (
                "A constraint is applied after updates",
                replace(six, nonnegative=True, optimizer="momentum"),
            ),
        ],
        "Values": [
            (
                "A micro-batch with a NaN can be left out",
                replace(spoiled, nonfinite="skip_microbatch"),
            ),
            (
                "A window with a NaN can be left out",
                replace(spoiled, nonfinite="skip_window"),
            ),
            (
                "bfloat16: 64 micro-batches add up",
                Problem(
                    problems.vectors(*[4] * 64, epochs=1),
                    accum_steps=64,
                    model="linear",
                    dtype="bfloat16",
                    learning_rate=1.0,
                ),
                # Rounding to 8 bits, of each gradient and of the weights.
                2**-7,
                weights_of_float32,
            ),
            ("float64 stays float64", replace(equal, dtype="float64"), 1e-12),
            (
                "float16 with a loss scale",
                replace(equal, dtype="mixed_float16"),
                # 11 bits, through a few layers.
                1e-2,
            ),
        ],
        "Layers": [
            (
                "An embedding's gradient, rows repeated",
                tokens,
            ),
            (
                "An embedding with Adam, rows repeated: as a dense gradient",
                replace(tokens, optimizer="adam", learning_rate=0.01),
                ROUNDING,
                weights_of_dense,
            ),
            (
                "Batch normalization: moving mean of the window's rows",
                normalized,
                1e-5,
                moving_mean,
            ),
            (
                "Batch normalization: moving variance of the window's rows",
                normalized,
                1e-5,
                moving_variance,
            ),
            (
                "Spectral normalization: one power iteration per update",
                replace(equal, model="spectral"),
                ROUNDING,
                power_vector,
            ),
            (
                "Dropout differs between micro-batches",
                dropped,
                0.25,
                alike_masks,
            ),
            (
                "The same seed gives the same bits, with dropout",
                dropped,
                0,
                bits_of_repeated,
            ),
        ],
        "Steps of one's own": [
            (
                "Two losses in two backward passes, each with its denominator",
                replace(rows_and_tokens, step="two_calls"),
            ),
            (
                "The loss of 8 rows in two parts, of 2 and 6 rows",
                replace(equal, step="two_parts"),
            ),
            ("Two networks, each with its loss and its optimizer", pair),
            (
                "A moving average by hand, once per update",
                replace(six, average=0.9, average_by_hand=True),
                ROUNDING,
                averages,
            ),
        ],
        "Replicas": [
            ("Two replicas are one device", two),
            ("Two replicas, masked tokens of uneven number", lopsided),
            (
                "Two replicas: the norm is clipped after the reduction",
                replace(two, clip_norm=0.1, learning_rate=1.0),
            ),
            (
                "Two replicas, 7 micro-batches an epoch, k = 4",
                replace(seven, replicas=2),
            ),
        ],
        "XLA": [
            ("Compiled by XLA", replace(equal, xla=True)),
            ("Compiled by XLA, two replicas", replace(two, xla=True)),
        ],
        "Runs": [
            (
                "k = 1 is training without accumulation, to the bit",
                replace(equal, accum_steps=1, optimizer="adam"),
                0,
                bits_of_plain,
            ),
            (
                "k may change between epochs: 2, 4, 1",
                replace(equal, steps_by_epoch=(2, 4, 1), optimizer="momentum"),
            ),
            (
                "k may follow the number of updates",
                replace(equal, steps_by_update=(1, 1, 2, 2, 2, 4)),
            ),
            (
                "Saved in mid-window and resumed, the same bits",
                replace(
                    equal,
                    optimizer="adam",
                    learning_rate=0.01,
                    resume_after=6,
                ),
                0,
                bits_of_resumed,
            ),
            (
                "The loss that an epoch reports, uneven sizes",
                replace(uneven, learning_rate=0.0),
                ROUNDING,
                loss,
            ),
            (
                "The loss that an epoch reports, masked tokens",
                replace(masked, learning_rate=0.0),
                ROUNDING,
                loss,
            ),
        ],
    }
    return [
        Check(topic, *row) for topic, rows in groups.items() for row in rows
    ]
