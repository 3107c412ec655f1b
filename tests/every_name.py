"""A program that uses every public name of the library, with every argument.

Type checkers read it, and it runs by itself in an environment that has the
library and nothing else:

    python tests/every_name.py

CONTRIBUTING.md has the commands. `tests/every_name_test.py` finds what is
missing here. What Keras returns is `Any` here where checkers misread it.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal
from typing import assert_type

import keras
import numpy as np
import tensorflow as tf

import keras_accum
from keras_accum.nonfinite_report import NonfiniteReport
from keras_accum.plan_table import Size

AccumSteps = int | Callable[[int], int]

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 8)).astype("float32")
y = rng.integers(0, 4, 64)


def loss_of_logits() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def plain() -> tuple[Any, Any]:
    """Makes the inputs and outputs of a small model."""
    inputs: Any = keras.Input((8,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    return inputs, keras.layers.Dense(4)(hidden)


def updates_of(model: keras.Model) -> int:
    return int(model.optimizer.iterations.numpy())


def train_with_accum_steps() -> keras_accum.GradientAccumulationModel:
    inputs, outputs = plain()
    model = keras_accum.GradientAccumulationModel(
        inputs,
        outputs,
        accum_steps=4,
        partial_window="flush",
        nonfinite="skip_microbatch",
        accumulator_dtype="float32",
        communication_dtype="bfloat16",
        window_metrics=("gradient_norm", "gradient_noise_scale"),
        name="accumulated",
    )
    model.compile("adam", loss_of_logits(), metrics=["accuracy"])
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert updates_of(model) == 4
    model.evaluate(x, y, batch_size=8, verbose=0)
    model.predict(x, batch_size=8, verbose=0)

    assert_type(model.accum_steps, AccumSteps)
    assert_type(model.nonfinite_microbatches, int)
    assert model.nonfinite_microbatches == 0
    assert_type(model.nonfinite_report, NonfiniteReport | None)
    assert model.nonfinite_report is None
    assert_type(model.accumulator_dtype, str | None)
    assert model.accumulator_dtype == "float32"
    assert_type(model.communication_dtype, Literal["bfloat16"] | None)
    model.communication_dtype = None
    assert model.window_metrics == ("gradient_norm", "gradient_noise_scale")
    model.window_metrics = [lambda gradients: tf.norm(gradients[0])]

    assert_type(model.partial_window, Literal["flush", "carry", "drop"])
    assert_type(
        model.nonfinite,
        Literal["propagate", "skip_microbatch", "skip_window"],
    )
    model.accum_steps = 2
    model.partial_window = "carry"
    model.nonfinite = "skip_window"
    model.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(model) == 8
    assert_type(model.nonfinite_windows, int)
    assert model.nonfinite_windows == 0

    model.fit(x[:8], y[:8], batch_size=8, verbose=0)
    model.flush()
    assert updates_of(model) == 9
    model.reset_window()
    return model


def train_in_microbatches() -> keras_accum.GradientAccumulationModel:
    inputs, outputs = plain()
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, microbatch_size=8
    )
    model.compile("adam", loss_of_logits())
    model.fit(x, y, batch_size=32, verbose=0)
    assert updates_of(model) == 2
    assert_type(model.microbatch_size, int | Literal["auto", "largest"] | None)
    assert model.microbatch_size == 8
    model.microbatch_size = "auto"
    model.microbatch_size = None

    found = keras_accum.verify(
        model=train_by_rows(), x=x[:16], y=y[:16], sample_weight=np.ones(16)
    )
    assert_type(found.exact, bool)
    assert found.exact, found
    assert_type(found.tolerance, float)
    for difference in found.differences:
        assert_type(difference.distance, float)
        names = (difference.name, difference.what)
        assert_type(names, tuple[str, str])
        assert not (difference.cause or difference.way_out)
    return model


def train_by_rows() -> keras_accum.GradientAccumulationModel:
    inputs, outputs = plain()
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, effective_batch_size=32
    )
    model.compile("adam", loss_of_logits())
    model.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(model) == 2
    assert_type(model.effective_batch_size, int | Callable[[int], int] | None)
    model.effective_batch_size = 16
    return model


def train_by_schedules() -> None:
    constants = keras_accum.schedules.PiecewiseConstant(
        boundaries=[2, 4], values=[1, 2, 4], unit="updates", microbatch=1
    )
    assert_type(constants(3), int)
    assert constants(3) == 2
    read = keras_accum.schedules.parse(
        text="0:1 2:2 4:4", unit="updates", microbatch=1
    )
    assert_type(read, keras_accum.schedules.PiecewiseConstant)
    assert read == constants
    ramp = keras_accum.schedules.LinearRamp(
        initial=1, final=4, duration=64, unit="samples", microbatch=8
    )
    again = keras_accum.schedules.LinearRamp.from_config(ramp.get_config())
    assert_type(again, keras_accum.schedules.LinearRamp)
    assert again == ramp
    model = keras_accum.GradientAccumulationModel.from_model(
        model=keras.Model(*plain()), accum_steps=ramp
    )
    assert_type(model, keras_accum.GradientAccumulationModel)
    model.accum_steps = lambda updates: 1 + updates
    model.compile("sgd", loss_of_logits())
    model.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(model) == 4  # Of 1, 2, 3 and the last 2.
    seesaw = keras_accum.schedules.Seesaw(
        learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 8),
        duration=8,
        accum_steps=1,
        maximum=2,
        rule="sgd",
    )
    assert_type(
        seesaw.learning_rate, keras.optimizers.schedules.LearningRateSchedule
    )
    model.accum_steps = seesaw
    rate: Any = seesaw.learning_rate
    model.compile(keras.optimizers.SGD(rate), loss_of_logits())
    model.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(model) == 6  # Of 1 up to the half, then of 2.
    noise = keras_accum.schedules.NoiseScale(minimum=2, maximum=4, ratio=1.0)
    assert_type(noise(0), int)
    model.accum_steps = noise
    model.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(model) == 10


class OwnSteps(keras_accum.GradientAccumulationModel):
    """A subclass with steps, a weight and an update of its own."""

    def __init__(self, inputs: Any, outputs: Any, accum_steps: int) -> None:
        super().__init__(inputs, outputs, accum_steps=accum_steps)
        self.loss_of = loss_of_logits()

    def train_step(self, data: Any) -> dict[str, Any]:
        inputs, labels = data
        with tf.GradientTape() as tape:
            outputs = self(inputs, training=True)
            loss: Any = keras.ops.mean(self.loss_of(labels, outputs))
            loss += sum(self.losses)
        weights = self.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.accumulate(
            gradients=zip(gradients, weights, strict=True),
            weight=self.microbatch_weight(
                x=inputs, y=labels, y_pred=outputs, sample_weight=None
            ),
            optimizer=self.optimizer,
        )
        return {"loss": loss}

    def test_step(self, data: Any) -> dict[str, Any]:
        return super().test_step(data)

    def microbatch_weight(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        return keras.ops.sum(keras.ops.ones_like(y_pred[:, 0]))

    def update_step(self) -> None:
        super().update_step()


class Mixed(keras_accum.GradientAccumulationMixin, keras.Sequential):
    """The mixin in front of another class of Keras."""


def train_classes() -> None:
    own = OwnSteps(*plain(), accum_steps=2)
    own.compile("sgd", loss_of_logits())
    own.fit(x, y, batch_size=8, verbose=0)
    own.evaluate(x, y, batch_size=8, verbose=0)
    assert updates_of(own) == 4

    mixed = Mixed([keras.Input((8,)), keras.layers.Dense(4)], accum_steps=2)
    mixed.compile("sgd", loss_of_logits())
    mixed.make_train_function(force=True)
    mixed.make_test_function(force=True)
    mixed.make_predict_function(force=True)
    mixed.train_step(data=(x[:8], y[:8]))
    mixed.test_step(data=(x[:8], y[:8]))
    mixed.reset_window()
    mixed.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(mixed) == 4


def train_by_hand() -> None:
    model = keras.Model(*plain())
    optimizer = keras.optimizers.Adam()
    variables = model.trainable_variables
    accumulator = keras_accum.GradientAccumulator(
        variables=variables, dtype=None
    )
    loss_of = loss_of_logits()
    gradients: list[Any] = []
    for begin in range(0, 32, 8):
        with tf.GradientTape() as tape:
            outputs = model(x[begin : begin + 8])
            loss: Any = loss_of(y[begin : begin + 8], outputs)
        gradients = tape.gradient(loss, variables)
        rows = keras.ops.cast(8, "float32")
        accumulator.add(gradients=gradients, weight=rows, first=begin == 0)
    assert_type(accumulator.mean(), list[tf.Tensor | None])
    assert_type(len(accumulator), int)
    assert len(accumulator.buffers) == len(accumulator.variables) == 4
    assert (float(accumulator.weight), int(accumulator.count)) == (32.0, 4)
    optimizer.apply(accumulator.mean(sums=accumulator.sums()), variables)

    state = accumulator.state(num_replicas=1)
    assert_type(list(state), list[str])
    assert state["weight"].shape == ()
    accumulator.check_state(state=state)
    accumulator.forget()
    accumulator.restore(state=state, num_replicas=1)
    assert int(accumulator.count) == 4
    accumulator.add_microbatch(
        parts=[(gradients, np.float32(8))],
        first=True,
        total=tf.constant(8.0),
        waits=False,
    )
    accumulator.reset()
    assert int(accumulator.count) == 0


def recompute() -> None:
    model = keras_accum.GradientAccumulationModel(*plain(), accum_steps=2)
    first: Any = model.layers[1]
    model.compile("sgd", loss_of_logits())
    try:
        keras_accum.rematerialize(model=model, layers=[first.name])
        keras_accum.rematerialize(model, [keras.layers.Dense, first])
        keras_accum.rematerialize(model, keras.layers.Dense)
    except ImportError:
        # Keras before 3.9 has nothing to recompute with.
        assert not hasattr(keras, "RematScope")
    model.fit(x, y, batch_size=8, verbose=0)
    assert updates_of(model) == 4


def plan_sizes() -> None:
    model = keras_accum.GradientAccumulationModel(*plain())
    model.compile("sgd", loss_of_logits())
    found = keras_accum.plan(
        model=model, x=x, y=y, sample_weight=None, memory_limit=2**30
    )
    assert found.memory_limit == 2**30
    assert_type(found.best, Size | None)
    assert found.best is not None
    assert found.best.total < 2**30
    assert found.best.rows in [each.rows for each in found.sizes]


def save_and_load(model: keras_accum.GradientAccumulationModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.keras"
        model.save(file)
        loaded: Any = keras.models.load_model(file)
        weights = pathlib.Path(folder) / "model.weights.h5"
        model.save_weights(weights)
        loaded.load_weights(weights)
    assert isinstance(loaded, keras_accum.GradientAccumulationModel)
    config = model.get_config()
    assert_type(config, dict[str, Any])
    again = keras_accum.GradientAccumulationModel.from_config(config=config)
    assert_type(again, keras_accum.GradientAccumulationModel)
    for made in (loaded, again):
        assert made.accum_steps == model.accum_steps
        assert made.microbatch_size == model.microbatch_size
    for one, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    loaded.fit(x, y, batch_size=8, verbose=0)


def main() -> None:
    save_and_load(train_with_accum_steps())
    save_and_load(train_in_microbatches())
    train_by_schedules()
    train_classes()
    train_by_hand()
    recompute()
    plan_sizes()
    print(
        f"keras_accum {keras_accum.__version__}, Keras {keras.__version__}, "
        f"TensorFlow {tf.__version__}: all passed."
    )


if TYPE_CHECKING:
    # Checkers must refuse each of these: one that is right, and still marked to
    # be ignored, is an error to them.
    Model = keras_accum.GradientAccumulationModel
    Model(accum_steps="8")  # type: ignore[arg-type]
    Model(microbatch_size="aut")  # type: ignore[arg-type]
    Model(partial_window="keep")  # type: ignore[arg-type]
    Model(nonfinite="skip")  # type: ignore[arg-type]
    Model.from_model(keras.Model(), 8)  # type: ignore[arg-type]
    Model.from_model(keras.Model(), accum_step=8)  # type: ignore[call-arg]
    Model().accum_steps = None  # type: ignore[assignment]
    Model().flush(1)  # type: ignore[call-arg]
    keras_accum.GradientAccumulator()  # type: ignore[call-arg]
    keras_accum.schedules.parse(8)  # type: ignore[arg-type]
    print(keras_accum.verify(Model(), [1]).inexact)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
