"""`schedules.NoiseScale`: windows as large as the noise of gradients asks for.

References:
    - [McCandlish et al., 2018](https://arxiv.org/abs/1812.06162): An Empirical
        Model of Large-Batch Training.
    - [Merrill et al., 2025](https://arxiv.org/abs/2505.23971): Critical Batch
        Size Revisited.
"""

import math
from numbers import Real

import keras

from keras_accum.checks import check_positive
from keras_accum.schedule_table import Configured

# A window of one micro-batch tells nothing; every so often there are two.
PROBE_EVERY = 8


@keras.saving.register_keras_serializable("keras_accum")
class NoiseScale(Configured):
    """A window of `ratio` times the gradient noise scale, within two bounds.

    As ordinary code, for each window:

    ```python
    wanted = min(max(k, ratio * low), ratio * high)
    k = min(max(round(wanted), k // 2, minimum), 2 * k, maximum)
    ```

    `low` and `high` are the ends of the 95 % interval of the noise scale, in
    micro-batches. So k stays while it may be right, and then goes as far as is
    known for certain. It begins with `minimum`, follows once 8 windows have
    told the scale, and at most doubles or halves from one window to the next.
    All replicas and workers take the same k. It is saved with the model.
    Nothing is traced again.

    A window of one micro-batch on one replica does not tell the scale: there,
    every eighth window has two.

    Give it as `accum_steps`, and the bounds are micro-batches; or as
    `effective_batch_size`, and they are rows.

    The scale tells the order of magnitude of the batch at which larger ones
    begin to be a waste; it is no optimum (Merrill et al., 2025).

    Args:
        minimum: The smallest window, in micro-batches or in rows; a positive
            int.
        maximum: The largest window; an int of at least `minimum`.
        ratio: What to multiply the scale by; a positive float. 1 is the batch
            at which half of the time and half of the data are wasted.

    Raises:
        TypeError: If a bound is no integer, or `ratio` no number.
        ValueError: If a bound is less than 1, `maximum` less than `minimum`, or
            `ratio` not positive and finite.

    Example:

    ```python
    model = keras_accum.GradientAccumulationModel(
        inputs,
        outputs,
        accum_steps=keras_accum.schedules.NoiseScale(2, 64),
        window_metrics=("gradient_noise_scale",),
    )
    ```
    """

    def __init__(self, minimum: int, maximum: int, ratio: float = 1.0) -> None:
        check_positive(
            minimum,
            "`minimum` must be a positive integer. "
            f"Received: minimum={minimum!r}",
        )
        check_positive(
            maximum,
            "`maximum` must be a positive integer. "
            f"Received: maximum={maximum!r}",
        )
        if maximum < minimum:
            raise ValueError(
                "`maximum` must not be less than `minimum`. Received: "
                f"minimum={minimum}, maximum={maximum}"
            )
        message = (
            f"`ratio` must be a positive number. Received: ratio={ratio!r}"
        )
        if isinstance(ratio, bool) or not isinstance(ratio, Real):
            raise TypeError(f"{message} (of type {type(ratio).__name__})")
        if not 0.0 < ratio < math.inf:
            raise ValueError(message)
        self._minimum, self._maximum = int(minimum), int(maximum)
        self._ratio = float(ratio)
        super().__init__(
            {
                "minimum": self._minimum,
                "maximum": self._maximum,
                "ratio": self._ratio,
            }
        )

    def __call__(
        self,
        updates: int,
        low: float = math.nan,
        high: float = math.nan,
        size: int = 0,
        num_replicas: int = 1,
        unit: int = 1,
    ) -> int:
        """Returns the micro-batches of the window that begins.

        Args:
            updates: The number of updates so far.
            low: The least that the noise scale may be, in micro-batches of each
                replica; NaN if that is not known.
            high: The most.
            size: The micro-batches of the last window; 0 if there was none.
            num_replicas: The number of replicas.
            unit: The rows of a micro-batch on all replicas together, if the
                bounds are rows; or 1.
        """
        least = -(-self._minimum // unit)
        most = max(self._maximum // unit, least)
        size = min(max(size, least), most)
        is_known = not (math.isnan(low) or math.isnan(high))
        if is_known:
            wanted = min(max(size, self._ratio * low), self._ratio * high)
            wanted = min(max(wanted, size / 2), size * 2)
            size = min(max(round(wanted), least), most)
        is_probe = not is_known or updates % PROBE_EVERY == 0
        # One alone tells nothing.
        return 2 if size * num_replicas == 1 and is_probe else size
