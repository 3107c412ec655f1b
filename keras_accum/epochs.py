"""Where `fit` is: epochs, their ends, and going on inside of one.

A window that the end of an epoch cuts short is ended, carried on or dropped.

Keras's `BackupAndRestore` goes on at the start of the epoch that it was in,
with the weights from the middle of it. Here the number of batches is saved with
the weights. Whatever loads them when training begins, and before the first
epoch does, has those batches skipped.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import advice
from keras_accum import compat
from keras_accum import discovery


@dataclasses.dataclass
class Progress:
    """The epoch, and its batches so far.

    Attributes:
        epoch: Index of the epoch.
        batches: Batches of it that the weights have seen; 0 outside of `fit`.
        to_skip: Batches of it that are still to be skipped.
        is_in_fit: Whether `fit` trains; `train_on_batch` has no epochs.
    """

    epoch: int = 0
    batches: int = 0
    to_skip: int = 0
    is_in_fit: bool = False
    _loaded: tuple[int, int] | None = None

    def begin_training(self) -> None:
        """Begins `fit`; what is loaded from now on counts."""
        self.end_training()
        self.is_in_fit = True
        self._loaded = None

    def load(self, epoch: int, batches: int) -> None:
        """Records where loaded weights come from."""
        self._loaded = epoch, batches

    def first_epoch(self, epoch: int | None) -> int | None:
        """Returns the epoch to begin with, if `BackupAndRestore` says `epoch`.

        `BackupAndRestore` counts epochs anew in each process, and so goes back
        to the first one if the training is killed twice.
        """
        return epoch if self._loaded is None else self._loaded[0]

    def begin_epoch(self, epoch: int) -> None:
        """Starts an epoch: the one that the weights come from, or another."""
        loaded_epoch, batches = self._loaded or (epoch, 0)
        self._loaded = None
        self.epoch = epoch
        self.batches = self.to_skip = batches if loaded_epoch == epoch else 0

    def advance(self, batches: int) -> None:
        """Counts batches that the weights have seen."""
        if self.is_in_fit:
            self.batches += batches

    def end_epoch(self) -> None:
        """Ends an epoch: the next one has seen no batches."""
        self.epoch, self.batches, self.to_skip = self.epoch + 1, 0, 0

    def end_training(self) -> None:
        """Ends `fit`."""
        self.batches = self.to_skip = 0
        self.is_in_fit = False


def skip_batches(accumulation, iterator) -> dict:
    """Skips batches that the weights have seen; returns no logs.

    Callbacks see the steps that are skipped, as they did the first time.

    Args:
        accumulation: What the model accumulates in.
        iterator: Over batches.
    """
    progress = accumulation.progress
    num_steps = accumulation.model.steps_per_execution
    for _ in range(min(num_steps, progress.to_skip)):
        data = next(iterator)
    # If nothing is left of the epoch, its end asks for metrics.
    discovery.build_for(accumulation, data)
    progress.to_skip = max(0, progress.to_skip - num_steps)
    return {}


class EndOfEpoch(keras.callbacks.Callback):
    """Ends the window before anyone looks at the model that an epoch made.

    It comes before all other callbacks: at the start of a validation, which
    `fit` tells its callbacks about, and at the epoch's end.

    Args:
        accumulation: What the model accumulates in.
    """

    def __init__(self, accumulation) -> None:
        super().__init__()
        self.set_model(accumulation.model)
        self._accumulation = accumulation

    def on_train_begin(self, logs=None):
        """Forgets a window that was left over, unless it is carried on."""
        accumulation = self._accumulation
        accumulation.position.forget_solution()
        accumulation.progress.begin_training()
        accumulation.watch.begin_training()
        is_carried = accumulation.options.partial_window == "carry"
        if is_carried or accumulation.is_restored:
            accumulation.resume()
        else:
            accumulation.model.reset_window()

    def on_epoch_begin(self, epoch, logs=None):
        """Begins an epoch, and records how many windows there were before."""
        accumulation = self._accumulation
        accumulation.progress.begin_epoch(epoch)
        accumulation.is_restored = False
        self._completed = int(accumulation.position.completed)
        accumulation.window["nonfinite"].begin_epoch()
        accumulation.window["told"].begin_epoch()
        accumulation.watch.begin_epoch()

    def on_test_begin(self, logs=None):
        """Ends the window before a validation."""
        self._end_window()

    def on_epoch_end(self, epoch, logs=None):
        """Ends the window before the epoch's end is announced."""
        self._end_window()
        accumulation = self._accumulation
        accumulation.watch.look_at_rest()
        accumulation.progress.end_epoch()
        if logs is not None:
            logs.update(accumulation.window["nonfinite"].logs())
            logs.update(accumulation.window["told"].logs(with_interval=True))
        advice.give(accumulation)
        advice.check_rate(accumulation)

    def _end_window(self):
        accumulation = self._accumulation
        policy = accumulation.options.partial_window
        position, size = accumulation.position.read()
        if policy == "carry" or position == 0:
            return
        if int(accumulation.position.completed) == self._completed:
            outcome = (
                "the epoch makes one update, of those that it has"
                if policy == "flush"
                else 'with `partial_window="drop"` it makes no update at all'
            )
            accumulation.losses.warn_once(
                "An epoch has fewer micro-batches than `accum_steps`: "
                f"{position}, with accum_steps={size}; {outcome}."
            )
        if policy == "flush":
            accumulation.model.flush()
        else:
            accumulation.model.reset_window()


class EndOfEpochWithMetrics(EndOfEpoch):
    """Also tells the callbacks after it what windows tell, in every step."""

    def on_train_batch_end(self, batch, logs=None):
        """Adds the metrics of windows to the logs, which all callbacks see."""
        if logs is not None:
            self._accumulation.window["told"].add_to(logs)


def end_of_epoch(accumulation) -> EndOfEpoch:
    """Returns the callback that comes before all others."""
    has_metrics = accumulation.options.window_metrics
    return (EndOfEpochWithMetrics if has_metrics else EndOfEpoch)(accumulation)


@contextlib.contextmanager
def keeping_weights_without_update(optimizer) -> Iterator[None]:
    """Keeps the weights as they are in a `fit` that makes no update.

    Keras ends it with averages of the weights (EMA), if the optimizer has them.
    Before the first update they are zeros: a `fit` of Keras makes one, but one
    that only begins a window does not.
    """
    if optimizer is None:  # `fit` says so.
        yield
        return

    def end(finalize, *args, **kwargs):
        if int(tf.convert_to_tensor(compat.iterations(optimizer))) > 0:
            finalize(*args, **kwargs)

    with compat.ending_training_by(optimizer, end):
        yield


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
    """Returns the name of the argument that gets all other keywords."""
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return name
    raise TypeError(
        "A `fit` of your own must take `callbacks`, or `**kwargs` that it "
        "passes on: gradient accumulation ends the epoch's last window in a "
        f"callback. Received: fit{signature}"
    )
