"""Where a learning rate has fallen to a half, a quarter, and so on."""

import bisect
import functools
import math
from collections.abc import Callable

import tensorflow as tf

# Relative. In float32 a half may be a little more, and is a half still.
ROUNDING = 2.0**-21
# Into how many parts the steps are divided, to look for the peak.
PARTS = 128


def rates_of(
    learning_rate: Callable[[tf.Tensor], tf.Tensor],
) -> Callable[[int], float]:
    """Returns a function from a step to the rate, which is computed once."""

    @functools.cache
    def rate_at(step):
        # On every machine alike; a scalar is not worth an accelerator.
        with tf.device("CPU:0"):
            return float(learning_rate(tf.constant(step, tf.int64)))

    return rate_at


def find_peak(rate_at: Callable[[int], float], duration: int) -> int:
    """Returns the first step at which the rate is highest.

    Of a rate that rises once and then falls, a few steps tell where to look.
    """
    low, high = 0, duration - 1
    while True:
        width = high - low
        steps = sorted({low + width * i // PARTS for i in range(PARTS + 1)})
        rates = [rate_at(step) for step in steps]
        top = rates.index(max(rates))
        check_rates(steps, rates, top)
        if width <= PARTS:
            return steps[top]
        low = steps[max(top - 1, 0)]
        high = steps[min(top + 1, PARTS)]


def find_cuts(
    rate_at: Callable[[int], float], peak: int, duration: int, count: int
) -> list[int]:
    """Returns the first steps at which the rate has fallen by 2, 4, ...

    Args:
        rate_at: The rate at a step.
        peak: The step from which on the rate falls.
        duration: Where to end.
        count: How many to find at most.
    """
    cuts = []
    for j in range(1, count + 1):
        limit = rate_at(peak) * 2.0**-j * (1.0 + ROUNDING)
        cut = peak + bisect.bisect_left(
            range(peak, duration), -limit, key=lambda step: -rate_at(step)
        )
        if cut == duration:
            break
        cuts.append(cut)
    return cuts


def check_rates(steps, rates, top):
    """Raises unless the rates rise up to the index `top`, and fall then."""
    if not (all(map(math.isfinite, rates)) and min(rates) >= 0 < rates[top]):
        raise ValueError(
            "`learning_rate` must return finite numbers that are not negative, "
            f"nor all 0. Received: from {min(rates)} to {max(rates)}"
        )
    for i in range(1, len(rates)):
        rise = (rates[i] - rates[i - 1]) * (1 if i > top else -1)
        if rise > ROUNDING * rates[top]:
            raise ValueError(
                "`learning_rate` must rise once, or not at all, and then fall. "
                f"Received: {rates[i - 1]} at step {steps[i - 1]}, and "
                f"{rates[i]} at step {steps[i]}. Give `Seesaw` a schedule "
                "without restarts."
            )
