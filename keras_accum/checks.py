"""Checks of arguments, which raise what the user should read."""

from collections.abc import Callable
from numbers import Integral
from typing import get_args

import keras
import tensorflow as tf

from keras_accum.annotations import WindowMetric

NORM, NOISE_SCALE = get_args(WindowMetric)


def check_model(model) -> None:
    """Raises a `TypeError` unless `model` is a model of Keras's."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}"
        )


def check_positive(value, message: str, kind: type = Integral) -> None:
    """Raises with `message` unless `value` is a number of at least 1."""
    # A bool is an int to Python, and a mistake here.
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{message} (of type {type(value).__name__})")
    if not value >= 1:
        raise ValueError(message)


def check_policy(argument: str, value, policies) -> None:
    """Raises a `ValueError` unless `value` of an argument is in `policies`."""
    if not isinstance(value, str) or value not in policies:
        names = ", ".join(f'"{name}"' for name in policies)
        raise ValueError(
            f"`{argument}` must be one of {names}. "
            f"Received: {argument}={value!r}"
        )


def check_dtype(argument: str, value) -> str | None:
    """Returns the name of a dtype, or raises unless it is None or a float's."""
    if value is None:
        return None
    try:
        dtype = tf.as_dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not dtype.is_floating:
        raise ValueError(
            f"`{argument}` must be None or the name of a float dtype, such as "
            f'"float32". Received: {argument}={value!r}'
        )
    return dtype.name


def check_window_metrics(value) -> tuple:
    """Returns metrics of windows as a tuple, or raises if there are others."""
    is_one = isinstance(value, str) or callable(value)
    metrics = (value,) if is_one else tuple(value or ())
    for metric in metrics:
        if not callable(metric) and metric not in (NORM, NOISE_SCALE):
            raise ValueError(
                f'`window_metrics` must be of "{NORM}", "{NOISE_SCALE}" and '
                "functions of the window's mean gradients. "
                f"Received: {metric!r}"
            )
    names = list(map(name_of, metrics))
    if len(set(names)) < len(names):
        raise ValueError(
            f"`window_metrics` must have different names. Received: {names}"
        )
    return metrics


def name_of(metric: WindowMetric | Callable) -> str:
    """Returns what a metric of windows is called in the logs."""
    if isinstance(metric, str):
        return metric
    return getattr(metric, "__name__", type(metric).__name__)
