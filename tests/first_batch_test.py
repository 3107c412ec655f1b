"""What is found out of a model's losses on the first batch, and its use."""

import random
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import first_batch
from keras_accum.coupling import Kind
from keras_accum.findings import Findings
from tests import test_utils
from tests.whole_batch_test import arrays
from tests.whole_batch_test import masked_mean

ROWS = 8


def linear(cls=keras.Model, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((5,))
    outputs = keras.layers.Dense(4, kernel_regularizer="l2")(x)
    return cls(x, outputs, **kwargs)


def scalar_mean(y, y_pred):
    return keras.ops.mean(keras.ops.square(y_pred - y))


def scalar_sum(y, y_pred):
    return keras.ops.sum(keras.ops.square(y_pred - y))


class Summing:
    """A loss of one's own that is a sum, in front of any model class."""

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        loss = scalar_sum(y, y_pred)
        return loss + keras.ops.sum(self.losses)


class Masked:
    """Says how much its loss counts."""

    def microbatch_weight(self, x, y, y_pred, sample_weight=None):
        return keras.ops.sum(keras.ops.cast(y > 0.5, "float32"))


class FirstBatchTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        loss=(scalar_mean, scalar_sum), way=("accum_steps", "microbatch_size")
    )
    @test_utils.first_command(0, 3)
    def test_functions_that_return_a_scalar(self, loss, way):
        self.check(linear, loss, way)

    @parameterized.parameters("accum_steps", "microbatch_size")
    @test_utils.first_command(second=(0,))
    def test_on_replicas(self, way):
        for loss in (scalar_mean, scalar_sum):
            self.check(
                linear, loss, way, strategy=test_utils.chosen_strategy()[0]
            )

    def test_of_compute_loss(self):
        def build(cls=keras.Model, **kwargs):
            class Model(Summing, cls):
                pass

            return linear(Model, **kwargs)

        self.check(build, None, "accum_steps")

    def test_of_microbatch_weight(self):
        def build(cls=keras.Model, **kwargs):
            class Model(Masked, cls):
                pass

            return linear(Model, **kwargs)

        self.check(build, masked_mean, "accum_steps")

    @pytest.mark.thorough
    def test_of_microbatch_weight_on_replicas(self):
        class Rows:
            def microbatch_weight(self, x, y, y_pred, sample_weight=None):
                return keras.ops.cast(keras.ops.shape(y)[0], "float32")

        def build(cls=keras.Model, **kwargs):
            class Model(Rows, cls):
                pass

            return linear(Model, **kwargs)

        strategy = test_utils.chosen_strategy()[0]
        self.check(build, scalar_mean, "accum_steps", strategy)

    def check(self, build, loss, way, strategy=None):
        way = {way: 3 if way == "microbatch_size" else 2}
        self.assertFitsAlike(build, loss, way, arrays(ROWS), 0.02, strategy)

    def test_changes_nothing(self):
        x, y = arrays(ROWS)
        keras.utils.set_random_seed(0)
        model = keras_accum.GradientAccumulationModel(
            *self.layers(), accum_steps=2
        )
        model.compile("adam", "mse", metrics=["mae"], jit_compile=False)
        model(x)
        before = [np.array(each) for each in model.variables]
        found = first_batch.find(model._accumulation, (tf.constant(x), y))
        self.assertEqual(found.compiled, (Kind.MEAN,))
        after = [np.array(each) for each in model.variables]
        self.assertAllClose(before, after, 0, 0)

    def layers(self):
        x = keras.Input((5,))
        hidden = keras.layers.BatchNormalization()(x)
        hidden = keras.layers.Dropout(0.5)(hidden)
        return x, keras.layers.Dense(4)(hidden)

    def test_makes_the_variables_that_fit_would(self):
        class Model(keras_accum.GradientAccumulationModel):
            def __init__(self):
                super().__init__(accum_steps=2)
                self.layer = keras.layers.Dense(4)

            def call(self, x):
                return self.layer(x)

        x, y = map(tf.constant, arrays(ROWS))
        weights = []
        for looks in (False, True):
            keras.utils.set_random_seed(0)
            model = Model()
            model.compile("sgd", "mse", jit_compile=False)
            if looks:
                first_batch.find(model._accumulation, (x, y))
            model(x)
            weights.append(model.get_weights())
        self.assertAllClose(weights[0], weights[1], 0, 0)

    def test_what_fails_is_left_to_training(self):
        def build(cls, **kwargs):
            class Model(cls):
                def call(self, x, training=False):
                    if tf.executing_eagerly():
                        raise RuntimeError("Not so.")
                    return super().call(x, training=training)

            return linear(Model, **kwargs)

        model = build(keras_accum.GradientAccumulationModel, accum_steps=2)
        model.compile("sgd", "mse", jit_compile=False)
        x, y = arrays(ROWS)
        model.fit(x, y, batch_size=2, verbose=0)
        found = model._accumulation.losses.findings
        self.assertEqual(found, Findings())

    def test_a_loss_that_draws_is_not_coupled(self):
        def noisy(y, y_pred):
            return (y - y_pred + tf.random.normal(tf.shape(y))) ** 2

        model = linear(keras_accum.GradientAccumulationModel, accum_steps=2)
        model.compile("sgd", noisy, jit_compile=False)
        x, y = map(tf.constant, arrays(ROWS))
        found = first_batch.find(model._accumulation, (x, y))
        self.assertEqual(found.compiled, (Kind.MEAN,))

    def test_leaves_the_states_of_random_generators(self):
        class Drawing(keras.losses.Loss):
            def __init__(self):
                super().__init__()
                self.seeds = keras.random.SeedGenerator(1)
                self.generator = tf.random.Generator.from_seed(1)

            def call(self, y, y_pred):
                keras.random.uniform((1,), seed=self.seeds)
                noise = self.generator.normal(tf.shape(y))
                return keras.ops.square(y - y_pred + noise)

        loss = Drawing()
        model = linear(keras_accum.GradientAccumulationModel, accum_steps=2)
        model.compile("sgd", loss, jit_compile=False)
        states = [random.getstate(), np.random.get_state()[1].tolist()]
        seeds = loss.seeds.state.numpy()
        state = loss.generator.state.numpy().copy()
        x, y = map(tf.constant, arrays(ROWS))
        found = first_batch.find(model._accumulation, (x, y))
        self.assertEqual(found.compiled, (Kind.MEAN,))
        self.assertAllEqual(loss.seeds.state, seeds)
        self.assertAllEqual(loss.generator.state, state)
        self.assertEqual(
            states, [random.getstate(), np.random.get_state()[1].tolist()]
        )

    def test_batches_that_lack_weights(self):
        if not hasattr(keras.Model, "_autoconvert_optionals"):
            self.skipTest("`fit` of this Keras takes no such batches.")

        def batches():
            x, y = arrays(ROWS)
            yield x[:4], y[:4], None
            yield x[4:], y[4:], None

        model = linear(keras_accum.GradientAccumulationModel, accum_steps=2)
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(batches(), verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 1)

    def test_a_step_that_reshapes_builds_the_model(self):
        class Model(keras_accum.GradientAccumulationModel):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.layer = keras.layers.Dense(4)

            def call(self, x):
                return self.layer(x)

            def train_step(self, data):
                x, y = data
                x = keras.ops.reshape(x, (-1, 10))
                return super().train_step((x, y))

        model = Model(accum_steps=2)
        model.compile("sgd", "mse", jit_compile=False)
        x, y = np.ones((ROWS, 2, 5)), np.ones((ROWS, 4))
        model.fit(x, y, batch_size=4, verbose=0)
        self.assertEqual(model.layer.kernel.shape, (10, 4))

    def test_stateful_layers_take_all_rows(self):
        keras.utils.set_random_seed(0)
        x = keras.Input(batch_shape=(ROWS, 3, 2))
        hidden = keras.layers.LSTM(4, stateful=True)(x)
        model = keras_accum.GradientAccumulationModel(
            x, keras.layers.Dense(1)(hidden), accum_steps=2
        )
        model.compile("sgd", "mse", jit_compile=False)
        with test_utils.no_warnings():
            model.fit(
                np.ones((2 * ROWS, 3, 2)),
                np.ones((2 * ROWS, 1)),
                batch_size=ROWS,
                verbose=0,
            )
        found = model._accumulation.losses.findings
        self.assertEqual(found, Findings((Kind.MEAN,), (False,)))

    def test_rows_sorted_by_label(self):
        x, y = arrays(48)
        # What the loss divides by differs late in the batch.
        y = np.sort(y, axis=0)
        model = linear(keras_accum.GradientAccumulationModel, accum_steps=2)
        model.compile("sgd", masked_mean, jit_compile=False)
        found = first_batch.find(model._accumulation, (tf.constant(x), y))
        self.assertEqual(found.compiled, (Kind.COUPLED,))

    def test_rows_of(self):
        ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
        self.assertEqual(
            first_batch.rows_of((tf.zeros((2, 3)), ragged, None)), 2
        )
        self.assertIsNone(first_batch.rows_of((tf.zeros((2, 3)), tf.zeros(3))))
        self.assertIsNone(first_batch.rows_of(tf.zeros(())))


class Readout(keras.layers.Layer):
    """Means over the nodes of each graph; adds one over all nodes, if asked."""

    def __init__(self, adds, **kwargs):
        super().__init__(**kwargs)
        self.adds = adds

    def call(self, nodes, graph):
        if self.adds:
            self.add_loss(keras.ops.mean(keras.ops.square(nodes)))
        return tf.math.segment_mean(nodes, graph)


class RaggedMean(keras.layers.Layer):
    def call(self, ragged):
        return tf.reduce_mean(ragged.with_values(ragged.values), axis=1)


class Ragged(keras_accum.GradientAccumulationModel):
    """Has no weights before its first call, which takes what is ragged."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = RaggedMean()
        self.dense = keras.layers.Dense(1, "sigmoid")

    def call(self, x):
        return self.dense(self.mean(x))


class OtherRowsTest(test_utils.TestCase, parameterized.TestCase):
    """Inputs that have not the rows of the labels, or none that are alike."""

    def batches(self, rows):
        rng = np.random.default_rng(0)
        sizes = rng.integers(2, 9, 16)
        nodes = rng.normal(size=(sizes.sum(), 4)).astype("float32")
        labels = rng.integers(0, 2, (16, 1)).astype("float32")
        graphs = tf.RaggedTensor.from_row_lengths(nodes, sizes)
        return tf.data.Dataset.from_tensor_slices((graphs, labels)).batch(rows)

    def fit(self, model, batches):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(batches, shuffle=False, verbose=0)
        return [str(each.message) for each in caught]

    @parameterized.parameters(
        ("binary_crossentropy", False, None),
        ("binary_crossentropy", False, None, "bfloat16"),
        ("binary_crossentropy", True, "cannot be measured"),
        ("dice", False, "is not the mean of what"),
    )
    def test_graphs_that_are_merged(self, loss, adds, expected, dtype=None):
        nodes, graph = keras.Input((4,)), keras.Input((), dtype="int64")
        hidden = Readout(adds)(keras.layers.Dense(3)(nodes), graph)
        model = keras_accum.GradientAccumulationModel(
            [nodes, graph],
            keras.layers.Dense(1, "sigmoid", dtype=dtype)(hidden),
            accum_steps=4,
        )
        model.compile(
            "sgd",
            keras.losses.Dice() if loss == "dice" else loss,
            jit_compile=False,
        )
        said = self.fit(
            model,
            self.batches(4).map(lambda x, y: ((x.values, x.value_rowids()), y)),
        )
        self.assertLen(said, 0 if expected is None else 1)
        if expected:
            self.assertRegex(said[0], expected)

    def test_ragged_inputs_of_a_model_without_weights(self):
        keras.utils.set_random_seed(0)
        model = Ragged(microbatch_size=4)
        model.compile("sgd", keras.losses.Dice(), jit_compile=False)
        self.assertEmpty(self.fit(model, self.batches(16)))
        self.assertTrue(model._accumulation.losses.found.couples_rows)


if __name__ == "__main__":
    tf.test.main()
