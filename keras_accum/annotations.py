"""What type checkers are told of arguments, where the code alone does not tell.

Checkers read a list of arguments only where it is written out, so that the
options of models stand here once more: a test compares them with `Options`.
"""

import functools
import inspect
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import Literal
from typing import ParamSpec
from typing import TypedDict
from typing import TypeVar

import keras
import tensorflow as tf

# An int, or a function from the number of updates so far to an int.
AccumSteps = int | Callable[[int], int]
# An int, or a `schedules.NoiseScale`.
EffectiveBatchSize = int | Callable[[int], int] | None
MicrobatchSize = int | Literal["auto", "largest"] | None
PartialWindow = Literal["flush", "carry", "drop"]
Nonfinite = Literal["propagate", "skip_microbatch", "skip_window"]
CommunicationDtype = Literal["bfloat16"] | None
WindowMetric = Literal["gradient_norm", "gradient_noise_scale"]

# What a gradient may be: dense, rows of an embedding, or missing.
Gradient = tf.Tensor | tf.IndexedSlices | None
# What users give may be NumPy's, or a result of `keras.ops`, whose type no
# checker knows.
AnyTensor = tf.Tensor | Any
AnyGradient = Gradient | Any
# A function gets the mean gradients, and returns a scalar.
WindowMetrics = (
    Iterable[WindowMetric | Callable[[list[Any]], Any]]
    | WindowMetric
    | Callable[[list[Any]], Any]
)
# As `apply_gradients` takes them, or gradients alone.
GradientsOrPairs = Iterable[AnyGradient | tuple[AnyGradient, keras.Variable]]
# How much a micro-batch counts; None for a sum.
Weight = float | AnyTensor | None

F = TypeVar("F", bound=Callable)
P = ParamSpec("P")


class Arguments(TypedDict, total=False):
    """The options of a model, as `**arguments`."""

    accum_steps: AccumSteps
    microbatch_size: MicrobatchSize
    effective_batch_size: EffectiveBatchSize
    partial_window: PartialWindow
    nonfinite: Nonfinite
    accumulator_dtype: str | None
    communication_dtype: CommunicationDtype
    window_metrics: WindowMetrics


def with_signature_of(
    template: Callable[P, None],
) -> Callable[[Callable[..., None]], Callable[P, None]]:
    """Returns a decorator that gives a function the signature of another."""

    def decorate(init: Callable[..., None]) -> Callable[P, None]:
        init.__signature__ = inspect.signature(template)
        return init

    return decorate


@with_signature_of
def takes_options(
    self: Any,
    *args: Any,
    accum_steps: AccumSteps = 1,
    microbatch_size: MicrobatchSize = None,
    effective_batch_size: EffectiveBatchSize = None,
    partial_window: PartialWindow = "flush",
    nonfinite: Nonfinite = "propagate",
    accumulator_dtype: str | None = None,
    communication_dtype: CommunicationDtype = None,
    window_metrics: WindowMetrics = (),
    **kwargs: Any,
) -> None:
    """Decorates an `__init__` that takes options out of its `**kwargs`.

    The function then has the signature of this one, for `help` and for type
    checkers; `with_signature_of` does that.
    """


def documented_by(theirs: Callable) -> Callable[[F], F]:
    """Decorates an override that has the docstring and signature of Keras's.

    To checkers it keeps its own: they take what `functools.wraps` returns for
    no method.
    """
    return functools.wraps(theirs)
