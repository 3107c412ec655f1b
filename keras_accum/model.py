"""`GradientAccumulationModel`: `keras.Model` with one update per window."""

from typing import Any

import keras

from keras_accum import functional
from keras_accum.annotations import takes_options
from keras_accum.mixin import GradientAccumulationMixin


class GradientAccumulationModel(GradientAccumulationMixin, keras.Model):
    """A `keras.Model` that updates once per window of k micro-batches.

    Train as if the batch were k times larger than what the device can hold, by
    changing the class and nothing else. After every update the weights and the
    optimizer's state are those that the concatenated batch would have given,
    up to rounding. As ordinary code:

    ```python
    for x, y in window:  # k micro-batches
        loss, gradient = loss_and_gradient(x, y)
        total, weight = total + len(x) * gradient, weight + len(x)
    optimizer.apply(total / weight)
    ```

    The real thing takes in place of `len(x)` what the loss was divided by, so
    that masks, sample weights and uneven micro-batches come out right, and
    compiles the steps for the device.

    The optimizer and all that hangs on it, learning-rate schedules, EMA, weight
    decay, clipping and constraints, see updates, never micro-batches. So do
    `optimizer.iterations`. The losses that `fit` reports are those of the
    windows. Compiling starts a new window.

    Args:
        *args: As for `keras.Model`: `inputs` and `outputs` of a functional
            model, or nothing if you subclass.
        accum_steps: Micro-batches per window, k: a positive int, or a function
            that gets the number of updates so far, an int, and returns one. It
            is called on the host when a window begins. 1 is `keras.Model`
            itself, without buffers. May be set at any time.
            Functions of `keras_accum.schedules` are saved with the model.
        microbatch_size: In place of `accum_steps`: each batch that `fit` sees
            makes one update, in micro-batches of at most that many rows on each
            replica. The batch size, steps per epoch and callbacks are then
            those of the large batch, and `evaluate` and `predict` take as many
            rows at once. `"auto"` begins with the whole batch and takes less
            where the device runs out of memory, until it fits; the same batch
            is trained again, from the same state. Then batches take turns with
            that size, half of it and a quarter, and the fastest is kept.
            `"largest"` keeps the largest. The size found becomes the value of
            `microbatch_size`, is logged, and saved.
        effective_batch_size: In place of `accum_steps`: rows per update, on all
            replicas together. How many micro-batches that takes follows from
            the first batch of each `fit`. Or a `schedules.NoiseScale`, whose
            bounds are then rows.
        partial_window: What becomes of a window that the epoch's end cuts
            short. `"flush"`: it makes an update, with its true weight, before
            validation. `"carry"`: the next epoch goes on with it, and so does
            the next `fit`. `"drop"`: it is forgotten.
        nonfinite: What becomes of gradients with a NaN or an infinity.
            `"propagate"`: they go where they go in Keras. `"skip_microbatch"`:
            the micro-batch, on the replica that has it, counts for nothing,
            in the update, the losses, the metrics and what layers keep. If
            none is left, there is no update. `"skip_window"`: the window makes
            no update, and leaves `iterations`, the losses and the moving
            statistics of BatchNormalization as they were; what its finite
            micro-batches gave to metrics stays. May be set at any time, which
            starts a new window. `fit` logs `nonfinite_microbatches` or
            `nonfinite_windows` in epochs that had any. A `LossScaleOptimizer`
            halves its scale after a window that had any, as in Keras, and does
            not grow it.
        accumulator_dtype: Dtype of the buffers, as a string. `None` stands for
            float32, or the variable's dtype if that is wider.
        communication_dtype: Dtype in which several replicas send their
            gradients. `None`: that of the buffers, 4 bytes for each parameter
            or more. `"bfloat16"`: 2 bytes. Then the sums of gradients are
            rounded to 8 bits, and added up in float32; all else is sent as it
            is. May be set at any time. On TPUs it does nothing.
        window_metrics: What `fit` reports of windows: `"gradient_norm"`, of the
            window's mean gradient before any clipping;
            `"gradient_noise_scale"`, how large a window is worth having, in
            rows or in what else micro-batches count by; and functions, which
            get the mean gradients of the trainable weights, tensors or None,
            and return a scalar. All but the noise scale are means over the
            windows of the epoch. At the end of an epoch the logs have the ends
            of its 95 % interval as well. May be set at any time. Of functions,
            those are saved that `keras.saving.register_keras_serializable` has
            registered.
        **kwargs: As for `keras.Model`.

    Raises:
        TypeError: If `accum_steps` is neither an integer nor a function, a size
            is no integer, or a functional model gets an argument that it does
            not take.
        ValueError: If `accum_steps` or a size is less than 1, more than one of
            `accum_steps`, `microbatch_size` and `effective_batch_size` is
            given, `partial_window`, `nonfinite`, `communication_dtype` or one
            of `window_metrics` is unknown, or `accumulator_dtype` is no float
            dtype. In `fit`: if `effective_batch_size` is no multiple of the
            batch, the batch cannot be split along its first axis, or
            "skip_microbatch" meets a `microbatch_size` and losses whose
            denominators differ.

    Example:

    ```python
    inputs = keras.Input((32,))
    outputs = keras.layers.Dense(10)(inputs)
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, accum_steps=8
    )
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=4)  # trains as if with batch_size=32
    ```
    """

    @takes_options
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if type(self) is GradientAccumulationModel:
            functional.check_positional(args)
        if functional.is_functional_call(args, kwargs):
            functional.check_functional_call(kwargs)
        super().__init__(*args, **kwargs)


# The package's name makes it unique; legacy .h5 files know the bare name.
keras.saving.register_keras_serializable("keras_accum")(
    GradientAccumulationModel
)
keras.saving.get_custom_objects()["GradientAccumulationModel"] = (
    GradientAccumulationModel
)
