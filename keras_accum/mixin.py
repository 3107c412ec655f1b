"""`GradientAccumulationMixin`: what Keras sees of models that accumulate.

Read it beside `keras.Model`: `train_step` is Keras's, except that it hands the
gradients to `accumulate` where Keras hands them to the optimizer. `update_step`
does the rest of Keras's step, once a window. What else is here decides when
windows begin and end, and what Keras is told of it.
"""

import functools
from collections.abc import Callable
from typing import Any
from typing import Never
from typing import Self
from typing import Unpack

import keras
import tensorflow as tf
from keras.callbacks import History

from keras_accum import annotations
from keras_accum import boundary
from keras_accum import building
from keras_accum import compat
from keras_accum import default_steps
from keras_accum import epochs
from keras_accum import evaluation
from keras_accum import functional
from keras_accum import iterators
from keras_accum import microbatch
from keras_accum import sharing
from keras_accum import steps
from keras_accum.accumulation import Accumulation
from keras_accum.annotations import Arguments
from keras_accum.attributes import option
from keras_accum.calls import make_call
from keras_accum.checkpoint import WindowCheckpoint
from keras_accum.checks import check_model
from keras_accum.nonfinite_report import NonfiniteReport
from keras_accum.options import Options
from keras_accum.options import check_optimizer
from keras_accum.overrides import Overrides
from keras_accum.rematerialization import ExactCalls
from keras_accum.rematerialization import exact
from keras_accum.saving import SavingMixin
from keras_accum.saving import arguments_of
from keras_accum.saving import take_original
from keras_accum.warned import did_you_mean


class GradientAccumulationMixin(
    ExactCalls, SavingMixin, compat.SymbolicBuildMixin
):
    """A mixin that puts gradient accumulation in front of any model class.

    ```python
    class Mine(keras_accum.GradientAccumulationMixin, Theirs):
        pass


    model = Mine(..., accum_steps=8)
    ```

    takes the arguments of `Theirs`, a subclass of `keras.Model`, and those of
    `GradientAccumulationModel`, which says what they mean.
    """

    _accumulation: Accumulation | None = None

    @annotations.takes_options
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = Options.take_from(kwargs)
        if functional.is_functional_call(args, kwargs):
            self.__class__ = functional.class_of_clone(type(self))
            # `keras.models.clone_model` gives inputs and outputs, and no more.
            original = take_original((args, kwargs))
            if original is not None and options == Options():
                options = Options(**arguments_of(original))
        # First, since a model may compile itself in its constructor.
        self._start_accumulation(options)
        try:
            super().__init__(*args, **kwargs)
        except (TypeError, ValueError) as error:
            unknown = [name for name in kwargs if repr(name) in str(error)]
            hint = did_you_mean(unknown, Options.names())
            if not hint:
                raise
            raise type(error)(f"{error}.{hint}") from error

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = GradientAccumulationMixin
        in_front = cls.__mro__[: cls.__mro__.index(ours)]
        # Not by `keras.Model`, which a user may have put ours in the place of.
        if any(
            issubclass(each, keras.layers.Layer) and not issubclass(each, ours)
            for each in in_front
        ):
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                "`GradientAccumulationMixin` must stand in front of the model "
                f"class: `class {cls.__name__}(GradientAccumulationMixin, "
                f"Theirs)`. Received: ({bases})"
            )

    def _start_accumulation(self, options):
        overrides = Overrides(self, GradientAccumulationMixin)
        accumulation = Accumulation(self, options, overrides)
        compat.set_untracked(self, "_accumulation", accumulation)
        checkpoint = WindowCheckpoint(accumulation)
        compat.set_untracked(self, "_accum_checkpoint", checkpoint)

    @classmethod
    def from_model(
        cls, model: keras.Model, *others: Never, **arguments: Unpack[Arguments]
    ) -> Self:
        """Makes a model that accumulates from one that exists already.

        It shares all with `model`: layers and variables, methods, names, and,
        where it is compiled, the optimizer and its state, the losses and the
        metrics. Training one trains both, and what is said of one, such as a
        layer added, may be seen in the other. Compile it to give it an
        optimizer, losses and metrics of its own.

        Args:
            model: Functional, `Sequential`, or of any other class; built or
                not, compiled or not. It stays what it is.
            *others: Nothing: what follows is given by name.
            **arguments: Those of `GradientAccumulationModel`, from
                `accum_steps` on, by name.

        Returns:
            A model, which is both of this class and of that of `model`.

        Raises:
            TypeError: If `model` is no `keras.Model`, or an argument is
                unknown or not given by name.
            ValueError: As `GradientAccumulationModel`.

        Example:

        ```python
        model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(10)])
        model = keras_accum.GradientAccumulationModel.from_model(
            model, accum_steps=8
        )
        ```
        """
        check_model(model)
        if others:
            raise TypeError(
                "What comes after the model is given by name, as in "
                f"`from_model(model, accum_steps=8)`. Received: {others[0]!r}"
            )
        options = Options.by_name(arguments)
        made = sharing.sharing_all(
            model, functional.subclass_of_both(cls, type(model))
        )
        with made.distribute_strategy.scope():
            made._start_accumulation(options)
        if made._accumulation.is_active:
            check_optimizer(getattr(made, "optimizer", None))
        return made

    @option
    def accum_steps(self) -> annotations.AccumSteps:
        """Micro-batches per window; may be set at any time.

        A change takes effect at the next window, and traces nothing again.
        """
        return self._accumulation.position.accum_steps

    @option
    def effective_batch_size(self) -> annotations.EffectiveBatchSize:
        """Rows per update, on all replicas together; or None."""
        return self._accumulation.options.effective_batch_size

    @option
    def microbatch_size(self) -> annotations.MicrobatchSize:
        """Most rows of a micro-batch on each replica; may be set at any time.

        None where each batch is a micro-batch. As given until the first batch
        showed what fits, and from then on the size that was found.
        """
        return self._accumulation.size.value

    @option
    def partial_window(self) -> annotations.PartialWindow:
        """What becomes of a window that the epoch's end cuts short."""
        return self._accumulation.options.partial_window

    @option
    def nonfinite(self) -> annotations.Nonfinite:
        """What becomes of gradients with a NaN or an infinity.

        May be set at any time. A change forgets the micro-batches that the
        window has so far, and traces the steps again.
        """
        return self._accumulation.options.nonfinite

    @property
    def nonfinite_microbatches(self) -> int:
        """Micro-batches that `"skip_microbatch"` left out, in this epoch.

        Of all replicas together. Without `fit`, since the last one began.
        """
        return self._accumulation.skipped("skip_microbatch")

    @property
    def nonfinite_windows(self) -> int:
        """Windows that `"skip_window"` left without an update, in this epoch.

        Without `fit`, since the last one began.
        """
        return self._accumulation.skipped("skip_window")

    @property
    def nonfinite_report(self) -> NonfiniteReport | None:
        """Who made the last gradients not finite that were skipped; or None."""
        return self._accumulation.watch.report

    @property
    def accumulator_dtype(self) -> str | None:
        """Dtype of the buffers, or None for float32 and wider."""
        return self._accumulation.options.accumulator_dtype

    @option
    def communication_dtype(self) -> annotations.CommunicationDtype:
        """Dtype in which replicas send their gradients; None for the buffers'.

        May be set at any time. A change traces the steps again.
        """
        return self._accumulation.options.communication_dtype

    @option
    def window_metrics(self) -> annotations.WindowMetrics:
        """What `fit` reports of windows; may be set, and traces again."""
        return self._accumulation.options.window_metrics

    @property
    def losses(self) -> list[tf.Tensor]:
        """Losses from `add_loss` and regularizers, as in `keras.Model`.

        If the loss is a sum over the window, so are these in a train step. A
        weight regularizer counts once a window, and is left out after that.
        """
        losses = self._accumulation.losses
        shown = losses.shown()
        return losses.of(super().losses) if shown is None else shown

    def train_step(self, data: Any) -> dict[str, Any]:
        """Adds one micro-batch to the window; never updates.

        Args:
            data: A batch as `fit` gets it: `x`, `(x, y)` or
                `(x, y, sample_weight)`.

        Returns:
            The logs: a dict of scalars.
        """
        accumulation = self._accumulation
        if not accumulation.is_active and microbatch.current(self) is None:
            return super().train_step(data)
        train = functools.partial(default_steps.train, accumulation)
        if not accumulation.overrides.is_behind("train_step"):
            return train(data)
        with compat.instead_of_keras(self, "train_step", train):
            return super().train_step(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates one batch, or one of its micro-batches, as Keras does.

        Args:
            data: As for `train_step`.

        Returns:
            The logs: a dict of scalars.
        """
        accumulation = self._accumulation
        if not (self.microbatch_size and microbatch.current(self)):
            return super().test_step(data)
        test = functools.partial(default_steps.test, accumulation)
        if not accumulation.overrides.is_behind("test_step"):
            return test(data)
        with compat.instead_of_keras(self, "test_step", test):
            return super().test_step(data)

    def accumulate(
        self,
        gradients: annotations.GradientsOrPairs,
        weight: annotations.Weight = 1.0,
        optimizer: keras.Optimizer | None = None,
    ) -> None:
        """Adds gradients to the window.

        A `train_step` of your own calls it in place of `apply_gradients`, any
        number of times. With `accum_steps=1` it is that call. Calls from one
        place in the code, as in a loop, are parts of one loss; from different
        places they are of different losses, each with a mean of its own, and
        the optimizer is given the sum of the means.

        All gradients of a window are those of the weights at its start. To
        train networks in turn, one after the other's update, give each windows
        of its own: see `GradientAccumulator`.

        Args:
            gradients: Pairs, as for `apply_gradients`, of some of the trainable
                weights or all; or gradients of all, in the order of
                `self.trainable_weights`. None where there is none. Gradients of
                `optimizer.scale_loss(loss)`, as in Keras.
            weight: How much they count: the denominator of the loss, for a mean
                the number of rows. A scalar; None if the loss is a sum. Take
                the mean of a loss per row first: a tape adds up its values.
            optimizer: Whose update they are for, if not `self.optimizer`'s.

        Raises:
            TypeError: If a pair, the weight or the optimizer is none.
            ValueError: If there are not as many gradients as trainable weights,
                a variable is none of these, or a shape is not its variable's.
        """
        current = microbatch.current(self)
        origins = None if current is None else current.origins
        call = make_call(self, gradients, weight, optimizer, origins)
        if current is not None or self._accumulation.is_active:
            steps.accumulate(self._accumulation, call)
        else:
            call.apply()

    def microbatch_weight(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> annotations.Weight:
        """Returns how much a micro-batch counts: the denominator of its loss.

        The default takes it from the losses given to `compile`: the number of
        entries, without masked ones, or what else the loss's `reduction`
        divides by. Without such a loss it is the number of rows, which is right
        for a mean over the batch. Override it for a loss of your own.

        There is one weight for all losses of a micro-batch. Where it fits not
        all of them, as for outputs whose masks or kinds of reduction differ,
        or a masked loss together with `add_loss`, each loss has gradients and
        sums of its own, or, with `microbatch_size`, its window's denominator,
        and this method is not called. It is called for an override of
        `compute_loss`.

        Args:
            x: Inputs of the micro-batch.
            y: Its labels, or None.
            y_pred: The model's outputs.
            sample_weight: Its sample weights, or None.

        Returns:
            A float scalar, or None where the loss is a sum and not a mean, so
            that gradients just add up.
        """
        return self._accumulation.losses.weight(x, y, y_pred, sample_weight)

    def update_step(self) -> None:
        """Ends the window: gives the mean gradient to the optimizer.

        With several replicas it is called within each, by `strategy.run`, and
        makes the one reduction of the window.
        """
        boundary.update(self, self._accumulation.window)

    def flush(self) -> None:
        """Updates now, from the micro-batches that the window has so far.

        Their true weight counts, not `accum_steps`. Does nothing if the window
        is empty.
        """
        self._accumulation.flush()

    def reset_window(self) -> None:
        """Forgets the micro-batches that the window has so far."""
        self._accumulation.reset()

    @annotations.documented_by(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> History:  # noqa: D102
        end_of_epoch = epochs.end_of_epoch(self._accumulation)
        args, kwargs = epochs.prepend_callback(
            super().fit, args, kwargs, end_of_epoch
        )
        try:
            with (
                iterators.ending(),
                exact(),
                compat.showing_graph(sharing.seen_as),
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
            self._accumulation.progress.end_training()
            self._accumulation.watch.end_training()

    @annotations.documented_by(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        with iterators.ending(), exact():
            return super().evaluate(*args, **kwargs)

    @annotations.documented_by(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        with iterators.ending(), exact():
            return super().predict(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Callable:
        """Makes `self.train_function`, if it is not there or `force` is set."""
        if self.train_function is not None and not force:
            return self.train_function
        if not self._accumulation.trains_itself():
            return super().make_train_function(force=force)
        self.train_function = self._accumulation.make_train_function()
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable:
        """Makes `self.test_function`, if it is not there or `force` is set."""
        if self.test_function is not None and not force:
            return self.test_function
        if not self._accumulation.tests_itself():
            return super().make_test_function(force=force)
        self.test_function = evaluation.make_test_function(self._accumulation)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Callable:
        """Makes `self.predict_function`, as `make_test_function`."""
        if self.predict_function is not None and not force:
            return self.predict_function
        if not self._accumulation.predicts_itself():
            return super().make_predict_function(force=force)
        predict = evaluation.make_predict_function(self._accumulation)
        self.predict_function = predict
        return self.predict_function

    def __setattr__(self, name, value):
        # Here, since an overridden `compile` is not called when loading.
        if name == "optimizer" and self._accumulation is not None:
            self._accumulation.set_optimizer(value)
        if name == compat.FIRST_EPOCH:
            value = self._accumulation.progress.first_epoch(value)
        super().__setattr__(name, value)

    def _build_from(self, iterator, data_batch):
        building.build_from(self, iterator, data_batch)
