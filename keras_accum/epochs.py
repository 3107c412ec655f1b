"""What becomes of a window that the end of an epoch cuts short."""

import contextlib
import inspect
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import compat


class EndOfEpoch(keras.callbacks.Callback):
    """Ends the window before anyone looks at the model that an epoch made.

    It comes before all other callbacks: at the start of a validation, which
    `fit` tells its callbacks about, and at the epoch's end.
    """

    def on_train_begin(self, logs=None):
        """Forgets what was left over, unless it is to be carried on."""
        self.model._accum_window.forget_solution()
        self.model._accum_progress.begin_training()
        if (
            self.model.partial_window == "carry"
            or self.model._accum_is_restored
        ):
            self.model._resume_window()
        else:
            self.model.reset_window()

    def on_epoch_begin(self, epoch, logs=None):
        """Notes how many windows there were before."""
        self.model._accum_progress.begin_epoch(epoch)
        self.model._accum_is_restored = False
        self._completed = int(self.model._accum_window.completed)
        if self.model._accum_nonfinite is not None:
            self.model._accum_nonfinite.forget()

    def on_test_begin(self, logs=None):
        """Ends the window before a validation."""
        self._end_window()

    def on_epoch_end(self, epoch, logs=None):
        """Ends the window before the epoch's end is announced."""
        self._end_window()
        self.model._accum_progress.end_epoch()
        if logs is not None:
            logs.update(self.model._nonfinite_logs())

    def _end_window(self):
        model, window = self.model, self.model._accum_window
        if model.partial_window == "carry" or int(window.position) == 0:
            return
        if int(window.completed) == self._completed:
            warn_of_short_epoch(model)
        if model.partial_window == "flush":
            model.flush()
        else:
            model.reset_window()


@contextlib.contextmanager
def keeping_weights_without_update(optimizer) -> Iterator[None]:
    """Lets a `fit` that makes no update leave the weights as they are.

    Keras ends it with averages of the weights (EMA), if the optimizer has them.
    Before the first update they are zeros: a `fit` of Keras makes one, but one
    that only begins a window does not.
    """
    if optimizer is None:  # `fit` says so.
        yield
        return

    def end(finalize, *args, **kwargs):
        if int(tf.convert_to_tensor(optimizer.iterations)) > 0:
            finalize(*args, **kwargs)

    with compat.ending_training_by(optimizer, end):
        yield


def warn_of_short_epoch(model):
    """Warns, once, that an epoch did not fill a single window."""
    window = model._accum_window
    outcome = (
        "the epoch makes one update, of those that it has"
        if model.partial_window == "flush"
        else 'with `partial_window="drop"` it makes no update at all'
    )
    model._warn_once(
        "An epoch has fewer micro-batches than `accum_steps`: "
        f"{int(window.position)}, with accum_steps={int(window.size)}; "
        f"{outcome}."
    )


def prepend_callback(fit, args, kwargs, callback):
    """Returns `args` and `kwargs` of a call of `fit`, with one more callback.

    Args:
        fit: The bound method `fit`, to look up where its callbacks are.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        callback: What is to be called before all other callbacks.

    Raises:
        TypeError: If `fit` is an override that does not take callbacks.
    """
    signature = inspect.signature(fit)
    bound = signature.bind(*args, **kwargs)
    arguments = bound.arguments
    if "callbacks" not in signature.parameters:
        # An override may pass on all that it gets, under whatever name.
        arguments = arguments.setdefault(name_of_the_rest(signature), {})
    callbacks = arguments.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        others = callbacks.callbacks
        # The list may have been given to an earlier `fit`.
        others[:] = [c for c in others if not isinstance(c, EndOfEpoch)]
        others.insert(0, callback)
    else:
        callbacks = keras.tree.flatten(callbacks or [])
        arguments["callbacks"] = [callback, *callbacks]
    return bound.args, bound.kwargs


def name_of_the_rest(signature):
    """Name of the argument that gets all other keywords."""
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return name
    raise TypeError(
        "A `fit` of your own must take `callbacks`, or `**kwargs` that it "
        "passes on: gradient accumulation ends the epoch's last window in a "
        f"callback. Received: fit{signature}"
    )
