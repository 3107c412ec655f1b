"""All kinds of things that a model's window gathers."""

import keras

from keras_accum.losses import Losses
from keras_accum.moments import WindowMoments
from keras_accum.nonfinite import SkipCounts
from keras_accum.options import Options
from keras_accum.overrides import Overrides
from keras_accum.repeated_state import RepeatedState
from keras_accum.window import LayerState
from keras_accum.window import MetricSums
from keras_accum.window import Window
from keras_accum.window_gradients import Gradients
from keras_accum.window_losses import WindowLosses
from keras_accum.window_metrics import WindowMetrics
from keras_accum.window_noise import WindowNoise


def make_window(
    model: keras.Model, options: Options, overrides: Overrides
) -> tuple[Window, Losses]:
    """Returns the window of a model, and what is known of the model's losses.

    Args:
        model: The model. It may not be constructed yet.
        options: Its options.
        overrides: Which of its methods are a user's own.
    """
    window_losses = WindowLosses(model)
    losses = Losses(model, window_losses, overrides)
    gradients = Gradients(model, options)
    noise = WindowNoise(model, options, gradients, losses)
    parts = {
        "gradients": gradients,
        "losses": window_losses,
        "moments": WindowMoments(model),
        "state": LayerState(model),
        "metrics": MetricSums(model),
        "repeated": RepeatedState(model),
        "nonfinite": SkipCounts(model, options.nonfinite),
        "noise": noise,
        "told": WindowMetrics(model, options, gradients, noise),
    }
    return Window(parts), losses
