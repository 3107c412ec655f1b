"""What a model owns that accumulates gradients, and its life between fits."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import boundary
from keras_accum import replicas
from keras_accum import rows
from keras_accum import training
from keras_accum.epochs import Progress
from keras_accum.microbatch import Microbatch
from keras_accum.microbatch_size import MicrobatchSize
from keras_accum.microbatch_size import check_layers
from keras_accum.options import Options
from keras_accum.options import check_optimizer
from keras_accum.overrides import Overrides
from keras_accum.position import Position
from keras_accum.watch import Watch
from keras_accum.window_kinds import make_window


class Accumulation:
    """The options of a model, its window and where it is, and its programs.

    Args:
        model: The model. It may not be constructed yet.
        options: Its options.
        overrides: Which of the model's methods are a user's own.

    Attributes:
        model: As above.
        options: As above; see `change`.
        overrides: As above.
        is_active: Whether gradients are gathered, unlike in a `keras.Model`.
        is_restored: Whether `fit` goes on with a window from a checkpoint.
        position: Where in its window the next micro-batch is.
        window: What was gathered.
        losses: The losses, and how much micro-batches count by them.
        size: Most rows of a micro-batch.
        progress: Where `fit` is.
        watch: Who made a gradient not finite.
    """

    def __init__(
        self,
        model: keras.Model,
        options: Options,
        overrides: Overrides,
    ) -> None:
        self.model, self.options, self.overrides = model, options, overrides
        # One of the user's own is called for windows of one micro-batch, too.
        self.is_active = options.accumulates or overrides.has("update_step")
        if self.is_active:
            replicas.check_strategy()
        self.is_restored = False
        self.progress = Progress()
        self.position = Position(options)
        self.size = MicrobatchSize(options.microbatch_size)
        self.window, self.losses = make_window(model, options, overrides)
        self.watch = Watch(self)
        self._update = None

    def change(self, **changes) -> None:
        """Changes options, and makes functions anew that no longer fit."""
        before, options = self.options, self.options.replace(**changes)
        model = self.model
        if changes.get("microbatch_size") is not None:
            check_layers(model)
        starts = options.accumulates and not self.is_active
        if starts:
            check_optimizer(getattr(model, "optimizer", None))
            with model.distribute_strategy.scope():
                replicas.check_strategy()
        if (
            changes.get("microbatch_size") is not None
            or before.nonfinite != options.nonfinite
        ):
            # What the window has was gathered in the other way.
            model.reset_window()
        self.options, self.is_active = options, self.is_active or starts
        if {"accum_steps", "effective_batch_size"} & changes.keys():
            self.position.set_options(options)
        if "microbatch_size" in changes:
            self.size = MicrobatchSize(options.microbatch_size)
        for name in ("gradients", "noise", "told"):
            self.window[name].options = options
        if before.traced_for != options.traced_for:
            self.window["noise"].leave_out()
        self.window["nonfinite"].policy = options.nonfinite
        # Between int and int there is nothing to trace.
        if (
            starts
            or "microbatch_size" in changes
            or before.traced_for != options.traced_for
        ):
            if model.train_function:
                model.make_train_function(force=True)
            model.test_function = model.predict_function = None

    def skipped(self, policy: str) -> int:
        """Returns how often a policy skipped this epoch; 0 if it is not set."""
        is_ours = self.options.nonfinite == policy
        return self.window["nonfinite"].skipped if is_ours else 0

    def set_optimizer(self, optimizer) -> None:
        """Starts a new window, for another optimizer."""
        if self.is_active:
            check_optimizer(optimizer)
            # Gradients are scaled as the old optimizer wanted them.
            self.model.reset_window()
            self.losses.forget()
            self.window["gradients"].forget_objectives()
        self._update = None

    def trains_itself(self) -> bool:
        """Returns whether the train function is ours.

        Without accumulation its windows have one micro-batch. It is then ours
        only where Keras's own function fails.
        """
        return self.is_active or self._is_beyond_keras()

    def tests_itself(self) -> bool:
        """Returns whether the test function is ours."""
        is_replicated = replicas.has_several(self.model.distribute_strategy)
        return (self.is_active and is_replicated) or self.predicts_itself()

    def predicts_itself(self) -> bool:
        """Returns whether the predict function is ours."""
        return self.size.value is not None or self._is_beyond_keras()

    def _is_beyond_keras(self):
        """Returns whether Keras's functions fail: see keras#20585.

        They do for several devices, with XLA or with other workers.
        """
        strategy = self.model.distribute_strategy
        if not replicas.has_several(strategy) or replicas.on_tpu(strategy):
            return False
        return self.model.jit_compile or replicas.has_several_workers(strategy)

    def make_train_function(self) -> training.TrainFunction:
        """Returns a new train function for the model."""
        if self.size.value is not None:
            check_layers(self.model)
        self.window["losses"].make_tracker()
        self._update = None
        return training.TrainFunction(self)

    def new_microbatch(
        self, data=None, is_first: bool | tf.Tensor | None = None, **known
    ) -> Microbatch:
        """Returns a `Microbatch`.

        Args:
            data: The micro-batch; None if it is not known.
            is_first: Whether it is the first; None if the buffers tell.
            **known: What is known of its window: see `Microbatch`.
        """
        is_replicated = replicas.has_several(self.model.distribute_strategy)
        is_empty = self.window["gradients"].is_empty
        return Microbatch(
            self.model,
            first=is_empty if is_first is None else is_first,
            has_rows=rows.has_rows(data) if is_replicated else None,
            size=rows.count(data),
            nonfinite=self.options.nonfinite,
            is_replicated=is_replicated,
            **known,
        )

    @contextlib.contextmanager
    def microbatch(
        self, data, is_first=None, trains: bool = True, **known
    ) -> Iterator[Microbatch]:
        """Yields a micro-batch, which is the current one until the step ends.

        Args:
            data: The micro-batch.
            is_first: See `new_microbatch`.
            trains: Whether the step trains, and not only evaluates.
            **known: See `new_microbatch`.
        """
        microbatch = self.new_microbatch(data, is_first, **known)
        with microbatch, microbatch.watched(layers=trains):
            if trains:
                self.window["repeated"].start(microbatch)
            yield microbatch

    def flush(self) -> None:
        """Updates now, unless the window is empty."""
        if not self.window["gradients"].num_microbatches:
            return
        self.position.write()
        self.window["losses"].resume()
        if self._update is None:
            self._update = boundary.make_update_for_host(self)
        self._update()

    def reset(self) -> None:
        """Forgets the micro-batches that the window has so far."""
        self.position.move_to(0)
        self.is_restored = False
        self.window.reset()

    def resume(self) -> None:
        """Continues with what calls of `train_step` by hand have gathered."""
        count = self.window["gradients"].num_microbatches
        position, _ = self.position.read()
        if self.size.value is None and count != position:
            self.position.write()
            self.position.begin(
                self.window["gradients"].updates_so_far(),
                noise=self.window["noise"].for_schedule(),
            )
            self.position.move_to(count)

    @contextlib.contextmanager
    def losing_failed_window(self) -> Iterator[None]:
        """Forgets what a step has added when it fails.

        With `microbatch_size`, the window was empty before. With `accum_steps`,
        a step adds as the last thing that it does. Of several replicas, some
        may have added; it takes a message in every step to find that out.
        """
        is_replicated = replicas.has_several(self.model.distribute_strategy)
        try:
            yield
        except (StopIteration, tf.errors.OutOfRangeError):
            raise
        except BaseException:
            if is_replicated or self.size.value is not None:
                self.model.reset_window()
            raise
