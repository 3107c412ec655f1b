"""Losses that layers add, and state that they assign, found and exact."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import first_batch
from keras_accum.coupling import Kind
from tests import test_utils

ROWS = 8


class Adding(keras.layers.Layer):
    """Adds a loss of what it sees.

    Args:
        reduce: A function of an array.
    """

    def __init__(self, reduce):
        super().__init__()
        self._reduce = reduce

    def call(self, inputs):
        self.add_loss(0.1 * self._reduce(inputs))
        return inputs


def of_rows(inputs):
    """One value for each row, as of CTC."""
    return keras.ops.mean(inputs**2, axis=-1, keepdims=True)


def balance(inputs):
    """Of all rows together, as of a mixture of experts."""
    shares = keras.ops.mean(keras.ops.softmax(inputs), axis=0)
    return keras.ops.sum(shares**2)


def mean(inputs):
    return keras.ops.mean(inputs**2)


def total(inputs):
    return keras.ops.sum(inputs**2)


def build(reductions, cls=keras.Model, dtype=None, rate=0.3, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((5,))
    hidden = keras.layers.Dense(6, "tanh", dtype=dtype)(x)
    hidden = keras.layers.Dropout(rate, seed=1, dtype=dtype)(hidden)
    inner = keras.Sequential([keras.Input((6,)), *map(Adding, reductions)])
    hidden = keras.layers.BatchNormalization(dtype=dtype)(inner(hidden))
    outputs = keras.layers.Dense(4, dtype=dtype)(hidden)
    return cls(x, outputs, **kwargs)


def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, 5)), rng.normal(size=(ROWS, 4))


class KindsTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(None, "mixed_bfloat16")
    @test_utils.first_command(0)
    def test_are_found_in_spite_of_dropout(self, dtype):
        reductions = (of_rows, mean, balance, total)
        model = build(
            reductions,
            keras_accum.GradientAccumulationModel,
            dtype,
            accum_steps=2,
        )
        model.compile("sgd", "mse", jit_compile=False)
        x, y = arrays()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y, batch_size=4, epochs=2, verbose=0)
        found = model._accumulation.losses.findings
        self.assertCountEqual(
            found.added, [Kind.SUM, Kind.ROW_MEAN, Kind.COUPLED, Kind.SUM]
        )
        said = [str(w.message) for w in caught]
        said = [each for each in said if "neither a mean" in each]
        self.assertLen(said, 1)
        layer = model.layers[3].layers[2]
        self.assertIn(f"`{layer.name}`", said[0])

    def test_one_row_tells_nothing(self):
        model = build(
            (mean,), keras_accum.GradientAccumulationModel, accum_steps=2
        )
        model.compile("sgd", "mse", jit_compile=False)
        x, y = arrays()
        model.fit(x[:2], y[:2], batch_size=1, verbose=0)
        self.assertEqual(model._accumulation.losses.findings.added, (None,))


class ExactTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        (
            {"reductions": (of_rows, total), "loss": None},
            {"reductions": (mean,), "loss": "mse"},
            {"reductions": (mean,), "loss": None},
        ),
        way=({"accum_steps": 4}, {"microbatch_size": 3}),
    )
    @test_utils.first_command(0, 3, second=(1,))
    def test_of_one_kind(self, reductions, loss, way):
        self.check(reductions, loss, way)

    @parameterized.parameters(None, "mse")
    @test_utils.first_command(1)
    def test_of_several_kinds(self, loss):
        way = {"microbatch_size": 3}
        self.check((of_rows, mean, total), loss, way)

    @pytest.mark.thorough
    def test_on_replicas(self):
        strategy, _ = test_utils.chosen_strategy()
        way = {"microbatch_size": 3}
        self.check((of_rows, mean), "mse", way, strategy)
        self.check((of_rows,), None, {"accum_steps": 2}, strategy)

    def check(self, reductions, loss, way, strategy=None):
        def linear(cls, **kwargs):
            keras.utils.set_random_seed(3)
            x = keras.Input((5,))
            hidden = keras.layers.Dense(6, kernel_regularizer="l2")(x)
            for reduce in reductions:
                hidden = Adding(reduce)(hidden)
            if loss:
                hidden = keras.layers.Dense(4)(hidden)
            return cls(x, hidden, **kwargs)

        x, y = arrays()
        batch = x, y if loss else None
        self.assertFitsAlike(linear, loss, way, batch, 0.03, strategy, 1e-5)


class Counting(keras.layers.Layer):
    """Assigns what follows from weights, or from the data as well."""

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )
        self.center = self.add_weight(
            name="center", shape=(shape[-1],), trainable=False
        )

    def call(self, inputs):
        self.calls.assign(self.calls + 1)
        self.center.assign(
            0.9 * self.center + 0.1 * keras.ops.mean(inputs, axis=0)
        )
        return inputs - self.center


class StateTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        way=("accum_steps", "microbatch_size"), jit_compile=(False, True)
    )
    @test_utils.first_command(0, second=(3,))
    def test_spectral_normalization_advances_once(self, way, jit_compile):
        def normalized(cls=keras.Model, **kwargs):
            keras.utils.set_random_seed(3)
            x = keras.Input((5,))
            hidden = keras.layers.SpectralNormalization(
                keras.layers.Dense(6, "tanh"), power_iterations=2
            )(x)
            return cls(x, keras.layers.Dense(4)(hidden), **kwargs)

        expected = normalized()
        actual = normalized(keras_accum.GradientAccumulationModel, **{way: 2})
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(
                keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile
            )
            x, y = arrays()
            is_split = model is actual and way == "accum_steps"
            model.fit(
                x,
                y,
                batch_size=ROWS // 2 if is_split else ROWS,
                epochs=3,
                shuffle=False,
                verbose=0,
            )
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )

    def test_sums_over_rows_are_left_alone(self):
        class Counting(keras.layers.Layer):
            def build(self, shape):
                self.rows = self.add_weight(
                    shape=(), initializer="zeros", trainable=False
                )

            def call(self, inputs):
                self.rows.assign_add(keras.ops.sum(keras.ops.ones_like(inputs)))
                return inputs

        x = keras.Input((5,))
        layer = Counting()
        model = keras_accum.GradientAccumulationModel(
            x, keras.layers.Dense(4)(layer(x)), accum_steps=4
        )
        model.compile("sgd", "mse", jit_compile=False)
        x, y = arrays()
        with test_utils.no_warnings():
            model.fit(x, y, batch_size=2, verbose=0)
        self.assertEqual(float(layer.rows), 5 * ROWS)

    def test_what_data_drive_is_said_once(self):
        keras.utils.set_random_seed(0)
        x = keras.Input((5,))
        layer = Counting()
        model = keras_accum.GradientAccumulationModel(
            x, keras.layers.Dense(4)(layer(x)), accum_steps=4
        )
        model.compile("sgd", "mse", metrics=["mae"], jit_compile=False)
        x, y = arrays()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y, batch_size=2, epochs=2, verbose=0)
        said = [str(w.message) for w in caught if "data" in str(w.message)]
        self.assertLen(said, 1)
        self.assertIn("center", said[0])
        # Two windows.
        self.assertEqual(int(layer.calls), 2)


class Mixes(keras.layers.Layer):
    """Rows that depend on each other, in the ways that models have."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def call(self, inputs):
        if self.how == "matrix":
            return keras.ops.matmul(inputs, keras.ops.transpose(inputs))
        if self.how == "mean":
            return inputs - keras.ops.mean(inputs, axis=0)
        if self.how == "little":
            # As embeddings that begin next to zero do.
            return 1 + 1e-3 * keras.ops.mean(inputs, axis=0) + 0 * inputs
        if self.how == "random":
            noise = np.random.default_rng().normal(size=3)
            return inputs + noise.astype("float32")
        return inputs


class MixedRowsTest(test_utils.TestCase, parameterized.TestCase):
    def found(self, build, x, **kwargs):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(x.shape[1:])
        model = keras_accum.GradientAccumulationModel(
            inputs, build(inputs), accum_steps=2, **kwargs
        )
        model.compile("sgd", "mse", jit_compile=False)
        labels = np.ones((len(x), 1), "float32")
        return first_batch.find(model._accumulation, (tf.constant(x), labels))

    @parameterized.parameters(
        ("matrix", True),
        ("mean", True),
        ("little", True),
        ("no", False),
        ("random", False),
    )
    def test_of_layers(self, how, expected):
        x = np.random.default_rng(0).normal(size=(20, 5)).astype("float32")
        found = self.found(lambda x: Mixes(how)(keras.layers.Dense(3)(x)), x)
        self.assertEqual(found.mixes_rows, expected)

    def test_keras_layers_are_no_false_alarm(self):
        def build(x):
            x = keras.layers.Conv1D(8, 3, padding="same")(x)
            x = keras.layers.BatchNormalization()(x)
            x = keras.layers.Dropout(0.5)(keras.layers.Activation("gelu")(x))
            x = keras.layers.GaussianNoise(1.0)(x)
            x = keras.layers.MultiHeadAttention(2, 4, dropout=0.3)(x, x)
            x = keras.layers.GroupNormalization(2)(x)
            x = keras.layers.Bidirectional(keras.layers.GRU(4))(x)
            return keras.layers.Dense(1)(keras.layers.LayerNormalization()(x))

        x = np.random.default_rng(0).normal(size=(20, 6, 5)).astype("float32")
        self.assertFalse(self.found(build, x).mixes_rows)

    def test_is_said_before_training(self):
        x = keras.Input((5,))
        model = keras_accum.GradientAccumulationModel(
            x, Mixes("matrix")(x), microbatch_size=4
        )
        model.compile("sgd", "mse", jit_compile=False)
        x = np.ones((4, 5), "float32") * np.arange(4.0)[:, None]
        with self.assertWarnsRegex(UserWarning, "the other rows of the batch"):
            model.fit(x, np.ones((4, 4)), verbose=0)


if __name__ == "__main__":
    tf.test.main()
