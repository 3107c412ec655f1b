"""`GradientAccumulationModel`: `keras.Model` with one update per window.

Read it beside `keras.Model`: `train_step` is Keras's, except that it hands the
gradients to `accumulate` where Keras hands them to the optimizer. `update_step`
does the rest of Keras's step, once a window. What else is here decides when
windows begin and end, and what Keras is told of it.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_accum import callers
from keras_accum import compat
from keras_accum import epochs
from keras_accum import fitting
from keras_accum import functional
from keras_accum import iterators
from keras_accum import microbatch
from keras_accum import microbatching
from keras_accum import replicas
from keras_accum import sharing
from keras_accum import training
from keras_accum.accumulator import Gradient
from keras_accum.accumulator import GradientAccumulator
from keras_accum.accumulator import check_dtype
from keras_accum.accumulator import check_lengths
from keras_accum.boundary import BoundaryMixin
from keras_accum.checkpoint import WindowCheckpoint
from keras_accum.losses import LossMixin
from keras_accum.nonfinite import NonfiniteMixin
from keras_accum.nonfinite import check_nonfinite
from keras_accum.progress import Progress
from keras_accum.saving import SavingMixin
from keras_accum.saving import take_original
from keras_accum.window import AccumSteps
from keras_accum.window import Window
from keras_accum.window import check_partial_window


class GradientAccumulationMixin(
    SavingMixin, BoundaryMixin, LossMixin, NonfiniteMixin
):
    """Puts gradient accumulation in front of any model class.

    ```python
    class Mine(keras_accum.GradientAccumulationMixin, Theirs):
        pass


    model = Mine(..., accum_steps=8)
    ```

    takes the arguments of `Theirs`, a subclass of `keras.Model`, and those of
    `GradientAccumulationModel`, which says what they mean.
    """

    # Whether gradients are gathered; if not, this is a `keras.Model`.
    _accumulating = False
    _accum_buffers: GradientAccumulator | None = None
    _accum_update = None
    # Whether the window comes from a checkpoint, and `fit` goes on with it.
    _accum_is_restored = False

    def __init__(
        self,
        *args,
        accum_steps: AccumSteps = 1,
        microbatch_size: int | str | None = None,
        effective_batch_size: int | None = None,
        partial_window: str = "flush",
        nonfinite: str = "propagate",
        accumulator_dtype: str | None = None,
        **kwargs,
    ) -> None:
        arguments = {
            "accum_steps": accum_steps,
            "microbatch_size": microbatch_size,
            "effective_batch_size": effective_batch_size,
            "partial_window": partial_window,
            "nonfinite": nonfinite,
            "accumulator_dtype": accumulator_dtype,
        }
        if functional.is_functional_call(args, kwargs):
            self.__class__ = functional.functional_subclass(type(self))
            # `keras.models.clone_model` gives inputs and outputs, and no more.
            original = take_original((args, kwargs))
            if original is not None and arguments == default_arguments():
                arguments = original._arguments()
        # First, since a model may compile itself in its constructor.
        self._take_arguments(**arguments)
        super().__init__(*args, **kwargs)

    def _take_arguments(
        self,
        *,
        accum_steps,
        microbatch_size,
        effective_batch_size,
        partial_window,
        nonfinite,
        accumulator_dtype,
    ):
        check_one_way(accum_steps, microbatch_size, effective_batch_size)
        self._accum_progress = Progress()
        compat.set_untracked(self, "_accum_checkpoint", WindowCheckpoint(self))
        self._accum_window = Window(accum_steps, effective_batch_size)
        self._accum_size = microbatching.MicrobatchSize(microbatch_size)
        self._nonfinite = check_nonfinite(nonfinite)
        self._accumulating = self._accumulates()
        if self._accumulating:
            replicas.check_strategy()
        self._partial_window = check_partial_window(partial_window)
        self._accumulator_dtype = check_dtype(
            "accumulator_dtype", accumulator_dtype
        )

    @classmethod
    def from_model(cls, model: keras.Model, **arguments) -> keras.Model:
        """Makes a model that accumulates of one that exists already.

        It shares all with `model`: layers and variables, methods, names, and,
        where it is compiled, the optimizer and its state, the losses and the
        metrics. Training one trains both, and what is said of one, such as a
        layer added, may be seen in the other. Compile it to give it an
        optimizer, losses and metrics of its own.

        Args:
            model: Functional, `Sequential`, or of any other class; built or
                not, compiled or not. It stays what it is.
            **arguments: Those of `GradientAccumulationModel`, from
                `accum_steps` on, by name.

        Returns:
            A model, which is both of this class and of that of `model`.

        Raises:
            TypeError: If `model` is no `keras.Model`, or an argument is
                unknown.
            ValueError: As `GradientAccumulationModel`.

        Example:

        ```python
        model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(10)])
        model = keras_accum.GradientAccumulationModel.from_model(
            model, accum_steps=8
        )
        ```
        """
        if not isinstance(model, keras.Model):
            raise TypeError(
                f"`model` must be a `keras.Model`. Received: model={model!r}"
            )
        known = default_arguments()
        unknown = arguments.keys() - known.keys()
        if unknown:
            raise TypeError(
                f"`from_model` takes {', '.join(f'`{name}`' for name in known)}"
                f" besides the model. Received: {', '.join(sorted(unknown))}"
            )
        made = sharing.sharing_all(
            model, functional.subclass_of_both(cls, type(model))
        )
        with made.distribute_strategy.scope():
            made._take_arguments(**known | arguments)
        if made._accumulating:
            check_optimizer(getattr(made, "optimizer", None))
        return made

    @property
    def accum_steps(self) -> AccumSteps:
        """Micro-batches per window; may be set at any time.

        A change takes effect at the next window, and traces nothing again.
        """
        return self._accum_window.accum_steps

    @accum_steps.setter
    def accum_steps(self, value: AccumSteps) -> None:
        check_one_way(value, self.microbatch_size, None)
        before = self._accum_window.kind
        self._accum_window.accum_steps = value
        # Between int and int there is nothing to trace.
        self._start_accumulating(changed=before != self._accum_window.kind)

    @property
    def effective_batch_size(self) -> int | None:
        """Rows per update, on all replicas together; or None."""
        return self._accum_window.effective_batch_size

    @effective_batch_size.setter
    def effective_batch_size(self, value: int | None) -> None:
        check_one_way(1, self.microbatch_size, value)
        before = self._accum_window.kind
        self._accum_window.effective_batch_size = value
        self._start_accumulating(changed=before != self._accum_window.kind)

    @property
    def microbatch_size(self) -> int | str | None:
        """Most rows of a micro-batch on each replica; may be set at any time.

        None where each batch is a micro-batch. "auto" until the first batch
        showed what fits, and from then on the size that was found.
        """
        return self._accum_size.value

    @microbatch_size.setter
    def microbatch_size(self, value: int | str | None) -> None:
        size = microbatching.MicrobatchSize(value)
        if value is not None:
            check_one_way(self.accum_steps, value, self.effective_batch_size)
            self.reset_window()
        self._accum_size = size
        self._start_accumulating(changed=True)

    def _accumulates(self):
        """Whether an update may be of several micro-batches."""
        return (
            self._accum_window.accumulates
            or bool(self.microbatch_size)
            or self.nonfinite != "propagate"
        )

    def _start_accumulating(self, changed):
        """Does what a change of the window's size asks for.

        Args:
            changed: Whether functions that were made do not fit any more.
        """
        if not self._accumulating and self._accumulates():
            check_optimizer(getattr(self, "optimizer", None))
            with self.distribute_strategy.scope():
                replicas.check_strategy()
            self._accumulating = changed = True
        if not changed:
            return
        if self.train_function:
            self.make_train_function(force=True)
        self.test_function = self.predict_function = None

    @property
    def partial_window(self) -> str:
        """What becomes of a window that the epoch's end cuts short."""
        return self._partial_window

    @partial_window.setter
    def partial_window(self, value: str) -> None:
        self._partial_window = check_partial_window(value)

    @property
    def accumulator_dtype(self) -> str | None:
        """Dtype of the buffers, or None for float32 and wider."""
        return self._accumulator_dtype

    def train_step(self, data) -> dict[str, tf.Tensor]:
        """Adds one micro-batch to the window; never updates.

        Args:
            data: A batch as `fit` gets it: `x`, `(x, y)` or
                `(x, y, sample_weight)`.

        Returns:
            The logs: a dict of scalars.
        """
        if not self._accumulating or self._has_custom_step("train_step"):
            return super().train_step(data)
        if microbatch.current(self) is None:
            with (
                self._microbatch(data, first=None) as now,
                self._gathering_moments(now),
            ):
                return self._train_on_microbatch(data)
        return self._train_on_microbatch(data)

    def _train_on_microbatch(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self._forward(x, training=True)
            loss = self._microbatch_loss(
                x, y, y_pred, sample_weight, training=True
            )
            self._build_optimizer()
            scaled_loss = self.optimizer.scale_loss(loss)
        if self.trainable_weights:
            gradients = tape.gradient(scaled_loss, self.trainable_weights)
            self._check_microbatch(microbatch.current(self), gradients)
        else:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=2
            )
        weight = self._count_loss(loss, x, y, y_pred, sample_weight)
        logs = self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        # Last, so that a step that fails leaves the window as it was.
        if self.trainable_weights:
            self.accumulate(gradients, weight)
        return logs

    def test_step(self, data) -> dict[str, tf.Tensor]:
        """Evaluates one batch, or one of its micro-batches; as Keras's.

        Args:
            data: As for `train_step`.

        Returns:
            The logs: a dict of scalars.
        """
        is_whole = not self.microbatch_size or not microbatch.current(self)
        if is_whole or self._has_custom_step("test_step"):
            return super().test_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self._forward(x, training=False)
        loss = self._microbatch_loss(
            x, y, y_pred, sample_weight, training=False
        )
        self._count_loss(loss, x, y, y_pred, sample_weight)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _has_custom_step(self, name):
        return compat.has_custom_step(self, GradientAccumulationMixin, name)

    def _forward(self, x, training):
        if compat.takes_training_argument(self):
            return self(x, training=training)
        return self(x)

    def accumulate(
        self,
        gradients: Sequence[Gradient],
        weight: float | tf.Tensor | None = 1.0,
    ) -> None:
        """Adds gradients to the window.

        What a `train_step` of your own calls in place of
        `self.optimizer.apply_gradients`. With `accum_steps=1` it is that call.

        Args:
            gradients: One per trainable weight, in the order of
                `self.trainable_weights`; None where there is none. Gradients
                of `self.optimizer.scale_loss(loss)`, as in Keras.
            weight: How much they count: the denominator of the loss, for a mean
                the number of rows. A scalar; None if the loss is a sum.

        Raises:
            ValueError: If there are not as many gradients as trainable weights.
        """
        gradients = list(gradients)
        check_lengths(gradients, self.trainable_weights)
        if not self._accumulating:
            self.optimizer.apply_gradients(
                zip(gradients, self.trainable_weights, strict=True)
            )
            return
        now = microbatch.current(self)
        if now is None and self.nonfinite == "skip_microbatch":
            now = microbatch.Microbatch(self, None, None)
        if now is not None:
            self._check_microbatch(now, gradients)
            gradients = now.gradients_or_nothing(gradients)
            weight = weight if weight is None else now.or_nothing(weight)
            now.has_accumulated = True
        self._gradient_accumulator().add(gradients, weight, self._is_first())

    def update_step(self) -> None:
        """Ends the window: gives the mean gradient to the optimizer.

        With several replicas it is called within each, by `strategy.run`, and
        makes the one reduction of the window.
        """
        accumulator = self._gradient_accumulator()
        strategy = self.distribute_strategy
        number = strategy.num_replicas_in_sync
        sums = self._accum_sums or replicas.sum_over_replicas(
            self._boundary_sums(), accumulator.weight
        )
        weight, *buffers = sums["gradients"]
        is_good = None
        if accumulator.variables:
            # Keras divides losses by the number of replicas.
            gradients = accumulator.mean([weight / number, *buffers])
            is_good = self._close_nonfinite(
                sums["nonfinite"], sums["gradients"]
            )
            with (
                self._updating_own_copies(),
                self._updating_if(is_good, sums["nonfinite"]),
            ):
                self.optimizer.apply_gradients(
                    zip(gradients, accumulator.variables, strict=True)
                )
        # The next micro-batch starts the buffers afresh.
        accumulator.forget()
        if is_good is not None:
            for name in ("losses", "moments"):
                sums[name] = [
                    tf.where(is_good, each, tf.zeros_like(each))
                    for each in sums[name]
                ]
        for tracker, window in zip(
            self._window_trackers(), sums["losses"], strict=True
        ):
            tracker.close(window, 1 / number)
        if self._accum_moments is not None:
            self._accum_moments.update_layers(sums["moments"])
        for variable, total in zip(
            self._state_variables(), sums["state"], strict=True
        ):
            variable.assign(total / number)

    def flush(self) -> None:
        """Updates now, from the micro-batches that the window has so far.

        Their true weight counts, not `accum_steps`. Does nothing if the window
        is empty.
        """
        if self._accum_buffers is None:
            return
        if int(self._accum_buffers.count.numpy()) == 0:
            return
        if self._accum_update is None:
            self._accum_update = training.make_flush_function(self)
        self._accum_window.catch_up()
        self._accum_update()

    def reset_window(self) -> None:
        """Forgets the micro-batches that the window has so far."""
        self._accum_window.rewind()
        self._accum_is_restored = False
        if self._accum_buffers is not None:
            self._accum_buffers.forget()
        if self._accum_moments is not None:
            self._accum_moments.forget()
        # Each replica for itself: another worker may have failed.
        for tracker in self._window_trackers():
            tracker.close_copies(self.distribute_strategy)
        if self._accum_nonfinite is not None:
            self._accum_nonfinite.forget_window()

    def _resume_window(self):
        """Goes on with what calls of `train_step` by hand have gathered."""
        if self._accum_buffers is None or self.microbatch_size:
            return
        count = int(self._accum_buffers.count.numpy())
        if count != int(self._accum_window.position):
            self._accum_window.begin(self.optimizer.iterations)
            self._accum_window.position.assign(count)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs) -> keras.callbacks.History:  # noqa: D102
        end_of_epoch = epochs.EndOfEpoch()
        end_of_epoch.set_model(self)
        args, kwargs = epochs.prepend_callback(
            super().fit, args, kwargs, end_of_epoch
        )
        try:
            with (
                iterators.ending(),
                epochs.keeping_weights_without_update(
                    getattr(self, "optimizer", None)
                ),
            ):
                return super().fit(*args, **kwargs)
        except BaseException:
            if self.partial_window != "carry":
                self.reset_window()
            raise
        finally:
            self._accum_progress.end_training()

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):  # noqa: D102
        with iterators.ending():
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.predict)
    def predict(self, *args, **kwargs):  # noqa: D102
        with iterators.ending():
            return super().predict(*args, **kwargs)

    def make_train_function(self, force: bool = False):
        """Makes `self.train_function`, if it is not there or `force` is set."""
        if self.train_function is not None and not force:
            return self.train_function
        if not self._accumulating and not self._needs_own_functions():
            return super().make_train_function(force=force)
        # Windows of one micro-batch, where Keras has no way.
        self._accumulating = True
        self._loss_tracker_of_windows()
        if self._accum_size.is_sought:
            make_function = fitting.make_fitting_function
        elif self.microbatch_size:
            make_function = training.make_batch_function
        else:
            make_function = training.make_window_function
        update = training.make_update_function(self)
        self.train_function = training.make_train_function(
            self, update, make_function
        )
        self._accum_update = None
        return self.train_function

    def make_test_function(self, force: bool = False):
        """Makes `self.test_function`, if it is not there or `force` is set."""
        if self.test_function is not None and not force:
            return self.test_function
        strategy = self.distribute_strategy
        is_ours = self._accumulating and replicas.has_several(strategy)
        is_ours = is_ours or self.microbatch_size
        if not is_ours and not self._needs_own_functions():
            return super().make_test_function(force=force)
        self.test_function = training.make_test_function(self)
        return self.test_function

    def make_predict_function(self, force: bool = False):
        """Makes `self.predict_function`, likewise."""
        if self.predict_function is not None and not force:
            return self.predict_function
        if not self.microbatch_size and not self._needs_own_functions():
            return super().make_predict_function(force=force)
        self.predict_function = training.make_predict_function(self)
        return self.predict_function

    def __setattr__(self, name, value):
        # Here, since an overridden `compile` is not called when loading.
        if name == "optimizer" and self._accumulating:
            check_optimizer(value)
            # Gradients are scaled as the old optimizer wanted them.
            self.reset_window()
            self._forget_kind_of_loss()
        if name == compat.FIRST_EPOCH:
            value = self._accum_progress.first_epoch(value)
        super().__setattr__(name, value)

    def _first_microbatch(self, data, *totals):
        """`train_step` for the first micro-batch of a window."""
        return self._checked_train_step(data, True, *totals)

    def _next_microbatch(self, data, *totals):
        """`train_step` for the other micro-batches of a window."""
        return self._checked_train_step(data, False, *totals)

    def _checked_train_step(self, data, first, *totals):
        with (
            self._microbatch(data, first, *totals) as now,
            self._gathering_moments(now),
            compat.before_updates(self._refuse_update),
        ):
            logs = self.train_step(data)
        if self.trainable_weights and not now.has_accumulated:
            raise RuntimeError(
                "`train_step` returned without a call of `self.accumulate`. "
                "A `train_step` of your own must call "
                "`self.accumulate(gradients, weight)`, where one that does not "
                "accumulate would call `self.optimizer.apply_gradients`."
            )
        return logs

    def _refuse_update(self, optimizer):
        """Raises if a `train_step` is about to update this model."""
        if optimizer is self.optimizer:
            raise RuntimeError(
                "`train_step` must leave the update to the model, since it "
                "accumulates. Call `self.accumulate(gradients, weight)` in "
                "place of the optimizer, with the number of rows as `weight` "
                f"if the loss is a mean. Received: {callers.line_of_caller()}"
            )

    def _first_test(self, data, *totals):
        """`test_step` for a batch, or for the first of its micro-batches.

        It leaves all as it was if there are no rows.
        """
        return self._test_microbatch(data, True, *totals)

    def _next_test(self, data, *totals):
        """`test_step` for the other micro-batches of a batch."""
        return self._test_microbatch(data, False, *totals)

    def _test_microbatch(self, data, first, *totals):
        function = self.test_function
        with self._microbatch(data, first, *totals):
            logs = self.test_step(data)
        # Replacing a metric asks for another function, and it is just made.
        self.test_function = function
        return logs

    @contextlib.contextmanager
    def _microbatch(
        self, data, first, totals=None
    ) -> Iterator[microbatch.Microbatch]:
        several = replicas.has_several(self.distribute_strategy)
        has_rows = microbatch.has_rows(data) if several else None
        with (
            microbatch.Microbatch(self, first, has_rows, totals) as now,
            compat.assigning_through(self._noting_state(now)),
        ):
            yield now

    def _is_first(self):
        """Whether the micro-batch is its window's first: a bool or a tensor."""
        now = microbatch.current(self)
        if now is not None and now.first is not None:
            return now.first
        return tf.equal(self._gradient_accumulator().count, 0)

    def _number_of_buffers(self):
        if self._accum_buffers is None:
            return 0
        return sum(buffer is not None for buffer in self._accum_buffers.buffers)

    def _gradient_accumulator(self):
        variables, known = self.trainable_weights, self._accum_buffers
        # A layer may have been built, or frozen, since the last call.
        if known is None or not same_objects(known.variables, variables):
            self._accum_buffers = GradientAccumulator(
                variables, self._accumulator_dtype
            )
        return self._accum_buffers

    def _build_optimizer(self):
        """Makes the optimizer's variables, where the update would be too late.

        Without its variables a `LossScaleOptimizer` scales by a constant, which
        would be traced as such, and no variables are made within replicas. All
        others are left for Keras to build at the first update.
        """
        optimizer, strategy = self.optimizer, self.distribute_strategy
        is_late = replicas.has_copies(strategy) or isinstance(
            optimizer, keras.optimizers.LossScaleOptimizer
        )
        is_late = is_late or self.nonfinite != "propagate"
        if is_late and not optimizer.built:
            replicas.on_each(strategy, self._build_optimizer_now)

    def _build_optimizer_now(self):
        with keras.name_scope(self.optimizer.name, caller=self.optimizer):
            self.optimizer.build(self.trainable_weights)

    def _build_for(self, data):
        """Makes all variables that training on a batch needs, unrun."""
        strategy = self.distribute_strategy
        compiled = compat.compiled_loss(self)
        own = replicas.first_part(strategy, data)
        with strategy.scope():
            if self.built and not self.optimizer.built:
                self._build_optimizer_now()
            compat.symbolic_build(self, own)
        if compiled is not None and compat.output_metrics(compiled):
            self._trackers_of_outputs()


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
            itself, without buffers. May be set at any time. Those of
            `keras_accum.schedules` are saved with the model.
        microbatch_size: In place of `accum_steps`: each batch that `fit` sees
            makes one update, in micro-batches of at most so many rows on each
            replica. The batch size, steps per epoch and callbacks are then
            those of the large batch, and `evaluate` and `predict` take as many
            rows at once. `"auto"` begins with the whole batch and takes less
            where the device runs out of memory, until it fits; the same batch
            is trained again, from the same state. The size found becomes the
            value of `microbatch_size`, is logged, saved, and kept.
        effective_batch_size: In place of `accum_steps`: rows per update, on all
            replicas together. How many micro-batches that takes follows from
            the first batch of each `fit`.
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
        **kwargs: As for `keras.Model`.

    Raises:
        TypeError: If `accum_steps` is neither an integer nor a function, a size
            is no integer, or a functional model gets an argument that it does
            not take.
        ValueError: If `accum_steps` or a size is less than 1, more than one of
            `accum_steps`, `microbatch_size` and `effective_batch_size` is
            given, `partial_window` or `nonfinite` is unknown, or
            `accumulator_dtype` is no float dtype. In `fit`: if
            `effective_batch_size` is no multiple of the batch, the batch cannot
            be cut along its first axis, or "skip_microbatch" meets a
            `microbatch_size` and losses whose denominators differ.

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

    def __init__(
        self,
        *args,
        accum_steps: AccumSteps = 1,
        microbatch_size: int | str | None = None,
        effective_batch_size: int | None = None,
        partial_window: str = "flush",
        nonfinite: str = "propagate",
        accumulator_dtype: str | None = None,
        **kwargs,
    ) -> None:
        if functional.is_functional_call(args, kwargs):
            functional.check_functional_call(kwargs)
        super().__init__(
            *args,
            accum_steps=accum_steps,
            microbatch_size=microbatch_size,
            effective_batch_size=effective_batch_size,
            partial_window=partial_window,
            nonfinite=nonfinite,
            accumulator_dtype=accumulator_dtype,
            **kwargs,
        )


def default_arguments():
    """The arguments of models that are ours, with their defaults."""
    return GradientAccumulationMixin.__init__.__kwdefaults__


def same_objects(some, others):
    """Whether two lists hold the very same objects."""
    return list(map(id, some)) == list(map(id, others))


def check_one_way(accum_steps, microbatch_size, effective_batch_size):
    """Raises a `ValueError` if the size of a window is said twice."""
    given = {
        "accum_steps": (
            accum_steps if callable(accum_steps) or accum_steps != 1 else None
        ),
        "microbatch_size": microbatch_size,
        "effective_batch_size": effective_batch_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        received = ", ".join(
            f"{name}={value!r}" for name, value in given.items()
        )
        raise ValueError(
            "`accum_steps`, `microbatch_size` and `effective_batch_size` each "
            f"say how large a window is; give one of them. Received: {received}"
        )


def check_optimizer(optimizer):
    """Raises a `ValueError` if the optimizer accumulates by itself."""
    inner = getattr(optimizer, "inner_optimizer", None)
    for part in [optimizer, inner, *getattr(optimizer, "optimizers", [])]:
        steps = getattr(part, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                "`optimizer` must not have `gradient_accumulation_steps` set, "
                "since it would accumulate a second time. Received: "
                f"gradient_accumulation_steps={steps}. Leave it out; "
                "`accum_steps` of the model does what it is for."
            )


# The package's name makes it unique; legacy .h5 files know the bare name.
keras.saving.register_keras_serializable("keras_accum")(
    GradientAccumulationModel
)
keras.saving.get_custom_objects()["GradientAccumulationModel"] = (
    GradientAccumulationModel
)
