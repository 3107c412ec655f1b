"""What a system is: the one adapter that the checks ask of each."""

import abc
import dataclasses

import numpy as np

from conformance.problems import Problem


class DoesNotApply(Exception):
    """The claim is about something that the system has no part in."""


class NoOption(Exception):
    """The system cannot be told to do what the claim is about."""


@dataclasses.dataclass
class Outcome:
    """What a run left behind.

    Attributes:
        weights: By the names of `problems.initial_weights`, kernels of shape
            (inputs, outputs), in float64.
        updates: The optimizer's own count of its updates; None if it has none.
        losses: The loss that was reported for each epoch; None if the system
            reports none.
        averages: Moving averages of the weights, as `weights`; or None.
        moving_mean: Of batch normalization; or None.
        moving_variance: Of batch normalization; or None.
        power_vector: Of spectral normalization; or None.
    """

    weights: dict[str, np.ndarray]
    updates: int | None = None
    losses: list[float] | None = None
    averages: dict[str, np.ndarray] | None = None
    moving_mean: np.ndarray | None = None
    moving_variance: np.ndarray | None = None
    power_vector: np.ndarray | None = None


class System(abc.ABC):
    """Trains problems, in one framework, with one way to accumulate."""

    @abc.abstractmethod
    def plain(self, problem: Problem) -> Outcome:
        """Trains on `problem.large_batches()`, without accumulation.

        On one device, uninterrupted, not compiled by XLA unless the problem
        says so.
        """

    @abc.abstractmethod
    def accumulated(self, problem: Problem) -> Outcome:
        """Trains on the micro-batches, as the system's documentation says.

        Raises:
            DoesNotApply: If the problem is about what the system has no part
                in, such as XLA in PyTorch. It says why.
            NoOption: If the system cannot be told what the problem asks.
        """
