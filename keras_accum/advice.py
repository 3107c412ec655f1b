"""What is said of the size of windows, at the end of an epoch."""

import math

from absl import logging

from keras_accum import compat
from keras_accum import noise_scale
from keras_accum.checks import NOISE_SCALE
from keras_accum.seesaw import Seesaw


def give(accumulation) -> None:
    """Logs, if half of a window or less would do nearly as well.

    That is: if trainings with it need at most a tenth more updates, even if the
    noise scale is at the upper end of its interval. It is said once, and again
    if it comes down to half of that.

    Args:
        accumulation: What the model accumulates in.
    """
    options, told = accumulation.options, accumulation.window["told"]
    if NOISE_SCALE not in options.window_metrics or options.follows_noise:
        return
    known = accumulation.window["noise"].known
    moments, found = known.moments(), known.estimate()
    if not moments.windows or not math.isfinite(found.high):
        return
    size = moments.sizes / moments.windows
    share = noise_scale.enough(size, found.high) / size
    text = smaller(accumulation, share)
    if share > 0.5 or text is None or told.advised / 2 < share:
        return
    told.advised = share
    logging.warning(
        "The gradient noise scale is %s (from %s to %s), and a window has %s. "
        "%s would do nearly as well: at most a tenth more updates.",
        *(f"{value:.3g}" for value in (*found, size)),
        text,
    )


def check_rate(accumulation) -> None:
    """Warns if k follows a `Seesaw`, and the learning rate now is not its own.

    Args:
        accumulation: What the model accumulates in.
    """
    seesaw = accumulation.options.accum_steps
    if not isinstance(seesaw, Seesaw):
        return

    def follows(optimizer):
        rate = seesaw.learning_rate(compat.iterations(optimizer))
        return math.isclose(optimizer.learning_rate, rate, rel_tol=1e-3)

    # Of several, one may have a rate of its own. A model may have none itself.
    objectives = accumulation.window["gradients"].objectives
    optimizers = [optimizer for _, optimizer in objectives if optimizer]
    if optimizers and not any(map(follows, optimizers)):
        accumulation.losses.warn_once(
            "`accum_steps` is a `Seesaw`, and no optimizer has its learning "
            "rate: windows grow, and the rate does not follow. Give the "
            "optimizer the attribute `learning_rate` of the `Seesaw`."
        )


def smaller(accumulation, share: float) -> str | None:
    """Returns what to write for a smaller window, or None if there is nothing.

    Args:
        accumulation: What the model accumulates in.
        share: Its size, over that of the windows so far.
    """
    options = accumulation.options
    if options.effective_batch_size is not None:
        rows = math.ceil(share * options.effective_batch_size)
        return f"`effective_batch_size={rows}`"
    if options.microbatch_size is not None:
        return f"{share:.0%} of the rows of a batch"
    _, before = accumulation.position.read()
    after = math.ceil(share * before)
    if after == before:
        return None
    return f"A window of {after} micro-batches instead of {before}"
