"""Exact gradient accumulation for Keras on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ValueError(
        'keras_accum needs the Keras backend "tensorflow". Received: '
        f"backend={keras.backend.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported."
    )

from keras_accum import heap
from keras_accum import schedules
from keras_accum.accumulator import GradientAccumulator
from keras_accum.mixin import GradientAccumulationMixin
from keras_accum.model import GradientAccumulationModel
from keras_accum.planning import plan
from keras_accum.rematerialization import rematerialize
from keras_accum.verification import verify

# Before there are threads, which keep the heaps that they have.
heap.share()

__version__ = "0.2.0"

__all__ = [
    "GradientAccumulationMixin",
    "GradientAccumulationModel",
    "GradientAccumulator",
    "__version__",
    "plan",
    "rematerialize",
    "schedules",
    "verify",
]


def __dir__() -> list[str]:
    """Lists the API, and not the modules that make it."""
    return __all__
