"""What becomes of a window that the end of an epoch cuts short."""

import inspect

import keras


class EndOfEpoch(keras.callbacks.Callback):
    """Ends the window before anyone looks at the model that an epoch made.

    It comes before all other callbacks: at the start of a validation, which
    `fit` tells its callbacks about, and at the epoch's end.

    Args:
        model: The `GradientAccumulationModel` that is trained.
    """

    def __init__(self, model) -> None:
        super().__init__()
        self._accumulation_model = model

    def on_train_begin(self, logs=None):
        """Forgets what was left over, unless it is to be carried on."""
        if self._accumulation_model.partial_window != "carry":
            self._accumulation_model.reset_window()

    def on_epoch_begin(self, epoch, logs=None):
        """Notes how many windows there were before."""
        self._completed = int(self._accumulation_model._window.completed)

    def on_test_begin(self, logs=None):
        """Ends the window before a validation."""
        self._end_window()

    def on_epoch_end(self, epoch, logs=None):
        """Ends the window before the epoch's end is announced."""
        self._end_window()

    def _end_window(self):
        window, policy = self._accumulation_model._window, self._accumulation_model.partial_window
        if policy == "carry" or int(window.position) == 0:
            return
        if int(window.completed) == self._completed:
            self._warn_of_short_epoch()
        if policy == "flush":
            self._accumulation_model.flush()
        else:
            self._accumulation_model.reset_window()

    def _warn_of_short_epoch(self):
        window = self._accumulation_model._window
        outcome = (
            "the epoch makes one update, of those that it has"
            if self._accumulation_model.partial_window == "flush"
            else 'with `partial_window="drop"` it makes no update at all'
        )
        self._accumulation_model._warn_once(
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
    """
    bound = inspect.signature(fit).bind(*args, **kwargs)
    arguments = bound.arguments
    if "callbacks" not in inspect.signature(fit).parameters:
        arguments = bound.arguments.setdefault("kwargs", {})
    callbacks = arguments.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        others = callbacks.callbacks
        # The list may have been given to an earlier `fit`.
        others[:] = [c for c in others if not isinstance(c, EndOfEpoch)]
        others.insert(0, callback)
    else:
        arguments["callbacks"] = [callback, *keras.tree.flatten(callbacks or [])]
    return bound.args, bound.kwargs
