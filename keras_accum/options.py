"""The arguments of models that accumulate, and what each may be."""

import dataclasses
from collections.abc import Mapping
from typing import Self
from typing import get_args

import numpy as np

from keras_accum.annotations import AccumSteps
from keras_accum.annotations import CommunicationDtype
from keras_accum.annotations import EffectiveBatchSize
from keras_accum.annotations import MicrobatchSize
from keras_accum.annotations import Nonfinite
from keras_accum.annotations import PartialWindow
from keras_accum.annotations import WindowMetrics
from keras_accum.checks import check_dtype
from keras_accum.checks import check_policy
from keras_accum.checks import check_positive
from keras_accum.checks import check_window_metrics
from keras_accum.noise_schedule import NoiseScale
from keras_accum.warned import did_you_mean

AUTO, LARGEST = "auto", "largest"
PARTIAL_WINDOW_POLICIES = get_args(PartialWindow)
NONFINITE_POLICIES = get_args(Nonfinite)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a model that accumulates, as its user gave them.

    What runs takes the list of these arguments from here; `annotations.py`
    repeats it for type checkers. `GradientAccumulationModel` says what they
    mean, and which errors they raise.
    """

    accum_steps: AccumSteps = 1
    microbatch_size: MicrobatchSize = None
    effective_batch_size: EffectiveBatchSize = None
    partial_window: PartialWindow = "flush"
    nonfinite: Nonfinite = "propagate"
    accumulator_dtype: str | None = None
    communication_dtype: CommunicationDtype = None
    window_metrics: WindowMetrics = ()

    def __post_init__(self) -> None:
        check_one_way(self)
        check_accum_steps(self.accum_steps)
        check_effective_batch_size(self.effective_batch_size)
        size = check_microbatch_size(self.microbatch_size)
        check_policy(
            "partial_window", self.partial_window, PARTIAL_WINDOW_POLICIES
        )
        check_policy("nonfinite", self.nonfinite, NONFINITE_POLICIES)
        dtype = check_dtype("accumulator_dtype", self.accumulator_dtype)
        check_communication_dtype(self.communication_dtype)
        metrics = check_window_metrics(self.window_metrics)
        # A frozen dataclass assigns so.
        object.__setattr__(self, "microbatch_size", size)
        object.__setattr__(self, "accumulator_dtype", dtype)
        object.__setattr__(self, "window_metrics", metrics)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of the arguments."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def take_from(cls, arguments: dict) -> Self:
        """Takes these arguments out of others, by name.

        Args:
            arguments: Keyword arguments of a model; what is found is removed.
        """
        return cls(
            **{
                name: arguments.pop(name)
                for name in cls.names()
                if name in arguments
            }
        )

    @classmethod
    def by_name(cls, arguments: Mapping) -> Self:
        """Makes options from arguments, all of which must be options.

        Raises:
            TypeError: If there is another.
        """
        unknown = arguments.keys() - set(cls.names())
        if unknown:
            names = ", ".join(f"`{name}`" for name in cls.names())
            raise TypeError(
                f"`from_model` takes {names} besides the model. "
                f"Received: {', '.join(sorted(unknown))}."
                f"{did_you_mean(unknown, cls.names())}"
            )
        return cls(**arguments)

    def replace(self, **changes) -> Self:
        """Returns these options with others in place of some.

        `accum_steps` and `effective_batch_size` replace each other, too.
        """
        if "accum_steps" in changes:
            changes = {"effective_batch_size": None} | changes
        elif "effective_batch_size" in changes:
            changes = {"accum_steps": 1} | changes
        return dataclasses.replace(self, **changes)

    @property
    def window_kind(self) -> str:
        """How the number of micro-batches in a window is found.

        A change of it needs another train function; one of the number does not.
        """
        if self.effective_batch_size is not None:
            return "rows"
        return "schedule" if callable(self.accum_steps) else "count"

    @property
    def traced_for(self) -> tuple:
        """What a change of makes programs be traced again."""
        return (
            self.window_kind,
            self.nonfinite,
            self.communication_dtype,
            self.window_metrics,
            self.follows_noise,
        )

    @property
    def noise_schedule(self) -> NoiseScale | None:
        """What follows the noise of gradients with the size of a window."""
        for size in (self.accum_steps, self.effective_batch_size):
            if isinstance(size, NoiseScale):
                return size
        return None

    @property
    def follows_noise(self) -> bool:
        """Whether the size of a window follows the noise of gradients."""
        return self.noise_schedule is not None

    @property
    def accumulates(self) -> bool:
        """Whether an update may be of several micro-batches, or of none."""
        return (
            self.window_kind != "count"
            or self.accum_steps != 1
            or self.microbatch_size is not None
            or self.nonfinite != "propagate"
            or bool(self.window_metrics)
        )


def check_one_way(options: Options) -> None:
    """Raises a `ValueError` if the size of a window is said twice."""
    steps = options.accum_steps
    given = {
        "accum_steps": steps if callable(steps) or steps != 1 else None,
        "microbatch_size": options.microbatch_size,
        "effective_batch_size": options.effective_batch_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        received = ", ".join(
            f"{name}={value!r}" for name, value in given.items()
        )
        raise ValueError(
            "`accum_steps`, `microbatch_size` and `effective_batch_size` each "
            "say how large a window is; give one of them. "
            f"Received: {received}. A model that has another one gives it up "
            "before: set its `accum_steps` to 1, or the others to None."
        )


def check_accum_steps(value) -> None:
    """Raises an error unless `value` is a positive int or a function."""
    if not callable(value):
        check_positive(
            value,
            "`accum_steps` must be a positive integer, or a function of the "
            "number of updates that returns one. "
            f"Received: accum_steps={value!r}",
        )


def check_scheduled(value, updates: int) -> np.int64:
    """Returns a schedule's result as int64; raises unless it is positive."""
    check_positive(
        value,
        "A function given as `accum_steps` must return a positive integer. "
        f"Received: accum_steps({updates})={value!r}",
    )
    return np.int64(value)


def check_effective_batch_size(value) -> None:
    """Raises an error unless `value` is None or a positive int."""
    if value is not None and not isinstance(value, NoiseScale):
        check_positive(
            value,
            "`effective_batch_size` must be a positive integer, a "
            "`schedules.NoiseScale` or None. "
            f"Received: effective_batch_size={value!r}",
        )


def check_microbatch_size(value) -> MicrobatchSize:
    """Returns `value`, or raises unless it may be one."""
    if value is None or (isinstance(value, str) and value in (AUTO, LARGEST)):
        return value
    check_positive(
        value,
        "`microbatch_size` must be a positive integer, "
        f'"auto", "largest" or None. Received: microbatch_size={value!r}',
    )
    return int(value)


def check_communication_dtype(value) -> None:
    """Raises a `ValueError` unless `value` is None or "bfloat16"."""
    # Sums over a window are beyond the range of float16.
    if value not in (None, "bfloat16"):
        raise ValueError(
            '`communication_dtype` must be None or "bfloat16". '
            f"Received: communication_dtype={value!r}"
        )


def check_optimizer(optimizer) -> None:
    """Raises a `ValueError` if the optimizer accumulates by itself."""
    inner = getattr(optimizer, "inner_optimizer", None)
    for each in [optimizer, inner, *getattr(optimizer, "optimizers", [])]:
        steps = getattr(each, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                "`optimizer` must not have `gradient_accumulation_steps` set, "
                "since it would accumulate a second time. Received: "
                f"gradient_accumulation_steps={steps}. Leave it out; "
                "`accum_steps` of the model does what it is for."
            )
