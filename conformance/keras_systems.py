"""The systems that train Keras models on TensorFlow.

One model, one loss, one optimizer for all of them, and for the reference: they
differ in the model's class and in where k is said. Also runs on Keras 2.13,
which is what the gradient-accumulator package installs.
"""

import contextlib
import functools
import os
import tempfile

import keras
import numpy as np
import tensorflow as tf

from conformance import keras_steps
from conformance import problems
from conformance.keras_steps import IS_KERAS_3
from conformance.keras_steps import AddsLoss
from conformance.keras_steps import OneHotEmbedding
from conformance.keras_steps import contrastive
from conformance.keras_steps import masked_mean
from conformance.problems import Batch
from conformance.problems import Problem
from conformance.system import DoesNotApply
from conformance.system import NoOption
from conformance.system import Outcome
from conformance.system import System

CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    CPU, [tf.config.LogicalDeviceConfiguration()] * 2
)


@functools.cache
def strategy_of(replicas: int) -> tf.distribute.Strategy:
    """Returns the default strategy, or two replicas on logical CPUs."""
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def set_dtype(dtype: str) -> None:
    """Makes all that is built from now on of this dtype."""
    floatx = "float64" if dtype == "float64" else "float32"
    keras.backend.set_floatx(floatx)
    keras.mixed_precision.set_global_policy(dtype)


def tensors(problem: Problem):
    """Returns the inputs and outputs of a functional model."""
    dense = keras.layers.Dense
    if problem.model == "dropout":
        inputs = keras.Input((problems.DROPPED,))
        kept = keras.layers.Dropout(0.5)(inputs)
        return inputs, dense(1, use_bias=False, name="output")(kept)
    if problem.model in ("tagger", "two_losses"):
        inputs = keras.Input((problems.LENGTH,), dtype="int32")
        cls = keras.layers.Embedding if problem.lookup else OneHotEmbedding
        hidden = cls(
            problems.TOKENS,
            problems.UNITS,
            mask_zero=not problem.is_scalar_function,
            name="embedding",
        )(inputs)
    else:
        inputs = hidden = keras.Input((problems.FEATURES,))
    if problem.model == "towers":
        both = [
            dense(problems.UNITS, name=name)(inputs)
            for name in ("query", "key")
        ]
        return inputs, keras.layers.Concatenate()(both)
    if problem.model in ("linear", "normalized"):
        if problem.model == "normalized":
            hidden = keras.layers.BatchNormalization(
                momentum=0.9, epsilon=1e-3, name="normalized"
            )(inputs)
        return inputs, dense(problems.CLASSES, name="output")(hidden)
    first = hidden_layer(problem)
    last = dense(
        1 if problem.model == "pair" else problems.CLASSES, name="output"
    )
    if problem.model == "pair":
        made = dense(problems.FEATURES, activation="tanh", name="generator")
        return inputs, [last(first(inputs)), last(first(made(inputs)))]
    hidden = first(hidden)
    if problem.added is not None:
        adds = AddsLoss(problem.added, problem.added_scale, name="adds")
        hidden = adds(hidden)
    outputs = last(hidden)
    if problem.model == "two_losses":
        row = dense(problems.CLASSES, name="row")(hidden[:, 0])
        outputs = [row, outputs]
    return inputs, outputs


def hidden_layer(problem: Problem) -> keras.layers.Layer:
    """Returns the layer of the hidden units."""
    l2 = keras.regularizers.L2
    layer = keras.layers.Dense(
        problems.UNITS,
        activation="tanh",
        kernel_regularizer=l2(problem.l2) if problem.l2 else None,
        activity_regularizer=(
            l2(problem.activity_l2) if problem.activity_l2 else None
        ),
        kernel_constraint=(
            keras.constraints.NonNeg() if problem.nonnegative else None
        ),
        name="hidden",
    )
    if problem.model == "spectral":
        return keras.layers.SpectralNormalization(layer, name="spectral")
    return layer


def variables(model: keras.Model) -> dict:
    """Returns the trainable variables by the names of `initial_weights`."""
    layers = {layer.name: layer for layer in model.layers}
    if "spectral" in layers:
        layers["hidden"] = layers["spectral"].layer
    named = {}
    for name in ("hidden", "output", "row", "query", "key", "generator"):
        if name in layers:
            named[f"{name}_kernel"] = layers[name].kernel
            if layers[name].use_bias:
                named[f"{name}_bias"] = layers[name].bias
    if "embedding" in layers:
        named["embedding"] = layers["embedding"].embeddings
    if "normalized" in layers:
        named["scale"] = layers["normalized"].gamma
        named["offset"] = layers["normalized"].beta
    return named


def array(variable) -> np.ndarray:
    """Returns a variable's value in float64."""
    return np.asarray(tf.cast(tf.convert_to_tensor(variable), tf.float64))


def make_loss(problem: Problem):
    """Returns what `compile` is given as the loss."""
    reduction = {
        "mean": "sum_over_batch_size",
        "sum": "sum",
        "weighted_mean": "mean_with_sample_weight",
    }[problem.reduction]
    if reduction == "mean_with_sample_weight" and not IS_KERAS_3:
        raise DoesNotApply("Keras 2 has no such reduction.")
    if problem.model == "pair":
        # The step has its own.
        return None
    if problem.model == "towers":
        return contrastive
    if problem.is_scalar_function:
        return masked_mean
    if problem.model == "dropout":
        return keras.losses.MeanSquaredError(reduction=reduction)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=reduction
    )
    return [loss, loss] if problem.model == "two_losses" else loss


def make_optimizer(problem: Problem, **kwargs) -> keras.optimizers.Optimizer:
    """Returns the optimizer; `kwargs` say how it accumulates."""
    rate = problem.learning_rate
    if problem.halving:
        rate = keras.optimizers.schedules.ExponentialDecay(rate, 1, 0.5)
    kwargs |= {
        "learning_rate": rate,
        "global_clipnorm": problem.clip_norm,
        "clipvalue": problem.clip_value,
    }
    if problem.average is not None and not problem.average_by_hand:
        kwargs |= {"use_ema": True, "ema_momentum": problem.average}
    if problem.optimizer == "momentum":
        return keras.optimizers.SGD(momentum=0.9, **kwargs)
    if problem.optimizer == "adamw":
        return keras.optimizers.AdamW(weight_decay=0.1, **kwargs)
    cls = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}
    return cls[problem.optimizer](**kwargs)


def structure(problem: Problem, batch: Batch) -> tuple:
    """Returns a batch as `fit` wants it."""
    y = batch.y
    if problem.is_scalar_function:
        y = np.where(batch.x == 0, problems.IGNORED, y).astype(y.dtype)
    arrays = (batch.x, y, batch.weight)
    return arrays if batch.weight is not None else arrays[:2]


def dataset(problem: Problem, batches: list[Batch]) -> tf.data.Dataset:
    """Returns the batches, in order, of a length that TensorFlow knows."""
    signature = tf.nest.map_structure(
        lambda value: tf.TensorSpec((None, *value.shape[1:]), value.dtype),
        structure(problem, batches[0]),
    )

    def generate():
        for batch in batches:
            # TensorFlow writes into arrays that it was given.
            yield tf.nest.map_structure(np.copy, structure(problem, batch))

    made = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return made.apply(tf.data.experimental.assert_cardinality(len(batches)))


class KerasSystem(System):
    """What is common: a model class, and an optimizer that may accumulate."""

    model_class: type[keras.Model] = keras.Model
    # Whether `fit` is given windows, and not micro-batches.
    takes_windows = False
    # What a user writes, by `Problem.step`.
    steps = {
        "two_calls": keras_steps.AppliesTwoLosses,
        "two_parts": keras_steps.AppliesTwoParts,
        "two_optimizers": keras_steps.AppliesForTwo,
    }

    def bases(self, problem: Problem) -> tuple[type, ...]:
        """Returns what a user's model class inherits, beside the system's."""
        return (self.steps[problem.step],) if problem.step in self.steps else ()

    def model_arguments(self, problem: Problem) -> dict:
        """Returns what the model's class is told of accumulation."""
        return {}

    def optimizer_arguments(self, problem: Problem) -> dict:
        """Returns what the optimizer is told of accumulation."""
        return {}

    def begin_epoch(self, model: keras.Model, steps: int) -> None:
        """Changes k, where a problem has a k for each epoch."""
        raise NoOption("k stays what it was.")

    def check(self, problem: Problem) -> None:
        """Raises if the system cannot do what the problem says."""

    def plain(self, problem: Problem) -> Outcome:
        cls = keras.Model
        if problem.step == "two_optimizers":
            cls = inheriting(keras_steps.AppliesForTwo, cls)
        with self._dtype(problem):
            model = self._build(problem, cls, {}, {})
            return self._fit(problem, model, problem.large_batches())

    def accumulated(self, problem: Problem) -> Outcome:
        self.check(problem)
        with self._dtype(problem), strategy_of(problem.replicas).scope():
            model = self._build(
                problem,
                inheriting(*self.bases(problem), self.model_class),
                self.model_arguments(problem),
                self.optimizer_arguments(problem),
            )
        with self._dtype(problem):
            if problem.resume_after is not None:
                return self._resume(problem, model)
            if self.takes_windows:
                return self._fit(problem, model, problem.whole_batches())
            epochs = [list(batches) for batches in problem.epochs]
            return self._fit(problem, model, epochs, problem.steps_by_epoch)

    def _dtype(self, problem):
        stack = contextlib.ExitStack()
        stack.callback(set_dtype, "float32")
        set_dtype(problem.dtype)
        return stack

    def _build(self, problem, cls, model_arguments, optimizer_arguments):
        keras.utils.set_random_seed(0)
        inputs, outputs = tensors(problem)
        model = cls(inputs=inputs, outputs=outputs, **model_arguments)
        initial = problems.initial_weights(problem.model)
        for name, variable in variables(model).items():
            variable.assign(initial[name])
        if problem.model == "spectral":
            vector = model.get_layer("spectral").vector_u
            vector.assign(problems.initial_vector(problems.UNITS)[None])
        optimizer = make_optimizer(problem, **optimizer_arguments)
        if problem.step == "two_optimizers":
            model.generator_optimizer = make_optimizer(
                problem, **optimizer_arguments
            )
        model.compile(
            optimizer,
            make_loss(problem),
            jit_compile=problem.xla,
            # The layer of Keras 2 cannot be compiled.
            run_eagerly=problem.model == "spectral" and not IS_KERAS_3,
        )
        return model

    def _fit(self, problem, model, epochs, steps_by_epoch=None):
        averaging, callbacks = None, []
        if problem.average_by_hand:
            averaging = self.averaging(problem, model)
            if isinstance(averaging, keras.callbacks.Callback):
                callbacks.append(averaging)
        lengths = {len(batches) for batches in epochs}
        if len(lengths) == 1 and steps_by_epoch is None:
            batches = [batch for batches in epochs for batch in batches]
            history = model.fit(
                dataset(problem, batches),
                epochs=len(epochs),
                steps_per_epoch=lengths.pop(),
                callbacks=callbacks,
                verbose=0,
            )
            losses = history.history["loss"]
            return outcome(problem, model, losses, averaging)
        losses = []
        for epoch, batches in enumerate(epochs):
            if steps_by_epoch is not None:
                self.begin_epoch(model, steps_by_epoch[epoch])
            if batches:
                history = model.fit(
                    dataset(problem, batches), callbacks=callbacks, verbose=0
                )
                losses += history.history["loss"]
        return outcome(problem, model, losses, averaging)

    def averaging(self, problem: Problem, model: keras.Model):
        """Returns what averages the weights by hand: it has `averages`."""
        return keras_steps.AveragesInCallback(model, problem.average)

    def _resume(self, problem, model):
        batches = list(problem.microbatches())
        for batch in batches[: problem.resume_after]:
            model.train_on_batch(*structure(problem, batch))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model" + (".keras" * IS_KERAS_3))
            model.save(path)
            model = keras.models.load_model(path)
        for batch in batches[problem.resume_after :]:
            model.train_on_batch(*structure(problem, batch))
        return outcome(problem, model)


def inheriting(*bases: type) -> type:
    """Returns a class of these bases."""
    return bases[0] if len(bases) == 1 else type("Own", bases, {})


def outcome(problem, model, losses=None, averaging=None) -> Outcome:
    """Returns what a trained model holds, and what averaged by hand."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    named = variables(model)
    result = Outcome(
        {name: array(variable) for name, variable in named.items()},
        updates=int(tf.convert_to_tensor(optimizer.iterations)),
        losses=losses,
    )
    if problem.average is not None:
        averages = dict(
            zip(
                [id(variable) for variable in model.trainable_variables],
                (
                    optimizer._model_variables_moving_average
                    if averaging is None
                    else averaging.averages
                ),
                strict=True,
            )
        )
        result.averages = {
            name: array(averages[id(variable)])
            for name, variable in named.items()
        }
    if problem.model == "normalized":
        layer = model.get_layer("normalized")
        result.moving_mean = array(layer.moving_mean)
        result.moving_variance = array(layer.moving_variance)
    if problem.model == "spectral":
        result.power_vector = array(model.get_layer("spectral").vector_u)
    return result


class KerasOwn(KerasSystem):
    """`gradient_accumulation_steps` of Keras's optimizers."""

    def check(self, problem):
        if problem.nonfinite != "propagate":
            raise NoOption("A NaN reaches the weights.")
        if problem.steps_by_update is not None:
            raise NoOption("`gradient_accumulation_steps` is an integer.")

    def optimizer_arguments(self, problem):
        steps = (problem.steps_by_epoch or (problem.accum_steps,))[0]
        if problem.step == "two_parts":
            steps *= 2
        # It takes integers of at least 2.
        return {"gradient_accumulation_steps": steps if steps > 1 else None}

    def begin_epoch(self, model, steps):
        # The only way that has an effect: k is read when `fit` is traced.
        model.optimizer.gradient_accumulation_steps = steps
        model.train_function = None


class KerasAccum(KerasSystem):
    """`GradientAccumulationModel(accum_steps=k)`."""

    steps = {
        "two_calls": keras_steps.AccumulatesTwoLosses,
        "two_parts": keras_steps.AccumulatesTwoParts,
        "two_optimizers": keras_steps.AccumulatesForTwo,
    }

    def bases(self, problem):
        bases = super().bases(problem)
        if problem.is_scalar_function and not self.takes_windows:
            bases += (keras_steps.CountsTokens,)
        if problem.average_by_hand:
            bases += (keras_steps.AveragesInUpdateStep,)
        return bases

    def averaging(self, problem, model):
        if not hasattr(model, "average"):
            # The reference.
            return super().averaging(problem, model)
        model.average(problem.average)
        return model

    @property
    def model_class(self):
        """The class, which peers' environments do not have."""
        import keras_accum

        return keras_accum.GradientAccumulationModel

    def model_arguments(self, problem):
        steps = problem.accum_steps
        if problem.steps_by_update is not None:
            by_update = problem.steps_by_update

            def steps(update):
                return by_update[min(update, len(by_update) - 1)]

        return {"accum_steps": steps, "nonfinite": problem.nonfinite}

    def begin_epoch(self, model, steps):
        model.accum_steps = steps


class KerasAccumMicrobatches(KerasAccum):
    """`GradientAccumulationModel(microbatch_size=n)`."""

    takes_windows = True

    def check(self, problem):
        if problem.resume_after is not None:
            raise DoesNotApply("No window is open between batches.")

    def model_arguments(self, problem):
        return {
            "microbatch_size": problem.most_rows // problem.replicas,
            "nonfinite": problem.nonfinite,
        }


class GradientAccumulatorPackage(KerasSystem):
    """`GradientAccumulateModel` of the gradient-accumulator package."""

    @property
    def model_class(self):
        """The class, which other environments do not have."""
        from gradient_accumulator import GradientAccumulateModel

        return GradientAccumulateModel

    def check(self, problem):
        if problem.nonfinite != "propagate":
            raise NoOption("A NaN reaches the weights.")
        if problem.steps_by_update is not None:
            raise NoOption("`accum_steps` is an integer.")
        if problem.step != "whole":
            raise NoOption("It accumulates in a `train_step` of its own.")

    def model_arguments(self, problem):
        return {
            "accum_steps": problem.accum_steps,
            "mixed_precision": problem.dtype == "mixed_float16",
            "experimental_distributed_support": problem.replicas > 1,
        }
