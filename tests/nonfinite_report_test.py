"""Who made a gradient not finite."""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import watch
from keras_accum.nonfinite_report import NonfiniteReport
from tests import test_utils

FEATURES, ROWS = 3, 4
POLICIES = ("skip_microbatch", "skip_window")
# Batches of four rows, two micro-batches each or two to a window.
WAYS = (
    {"accum_steps": 2},
    {"microbatch_size": 2},
    {"effective_batch_size": 8},
)


class Root(keras.layers.Layer):
    """The square root of the distance from 1.5, where its gradient is none."""

    def call(self, x):
        return tf.sqrt(tf.abs(x - 1.5))


class Logarithm(keras.layers.Layer):
    def call(self, x):
        return tf.math.log(x)


def batches(count=4, seed=0):
    """Returns batches of positive numbers."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.uniform(1, 2, (ROWS, FEATURES)).astype("float32"),
            rng.normal(size=(ROWS, 1)).astype("float32"),
        )
        for _ in range(count)
    ]


def spoiled(batch, value, rows, part=0):
    batch = [array.copy() for array in batch]
    batch[part][list(rows)] = value
    return tuple(batch)


def sequential(*layers):
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def accumulating(model, policy=POLICIES[0], jit_compile=False, **kwargs):
    kwargs = kwargs or WAYS[0]
    model = keras_accum.GradientAccumulationModel.from_model(
        model, nonfinite=policy, **kwargs
    )
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    return model


def fit(model, data, **kwargs):
    kwargs = {"verbose": 0, "shuffle": False, "epochs": 1} | kwargs
    return model.fit(test_utils.dataset(data), **kwargs)


def named(stage, layer=None):
    """Returns rows to spoil, with what, and a model that fails for them."""
    dense = keras.layers.Dense(2)
    value, made = {
        "input": (np.nan, keras.layers.Dropout(0.5)),
        "forward": (0.0, Logarithm(name="mine")),
        "backward": (1.5, Root(name="mine")),
    }[stage]
    first = [made] if stage != "input" else [dense, made]
    if stage == "backward":
        # Else nobody asks for the gradient with respect to the input.
        first = [keras.layers.Rescaling(1.0), Scale(), made]
    rest = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    return value, sequential(*first, *rest)


class Scale(keras.layers.Layer):
    """Has a weight, which changes nothing, and gradients."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return x + 0.0 * self.scale


class StageTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        stage=("input", "forward", "backward"),
        policy=POLICIES,
        way=(0, 1, 2),
        jit_compile=(False, True),
    )
    @test_utils.first_command(0, 18, 27, second=(3, 10, 13, 16, 21, 24, 31, 34))
    def test_batch_rows_and_layer(self, stage, policy, way, jit_compile):
        value, model = named(stage)
        model = accumulating(model, policy, jit_compile, **WAYS[way])
        data = batches()
        data[2] = spoiled(data[2], value, [1])
        with self.assertLogs("absl", "WARNING") as logs:
            fit(model, data)
        report = model.nonfinite_report
        self.assertEqual(report.stage, stage)
        self.assertEqual((report.epoch, report.batch), (0, 2))
        self.assertEqual(report.rows, (1,))
        if stage == "input":
            self.assertIsNone(report.layer)
        else:
            self.assertEndsWith(report.layer, "mine")
        self.assertLen(logs.output, 1)
        self.assertIn(str(report), logs.output[0])

    @pytest.mark.thorough
    def test_labels_and_sample_weights(self):
        for part, name in ((1, "labels"), (2, "sample weights")):
            model = accumulating(sequential(keras.layers.Dense(1)))
            data = [(x, y, np.ones(ROWS, "float32")) for x, y in batches()]
            data[1] = spoiled(data[1], np.inf, [0, 3], part)
            fit(model, data)
            report = model.nonfinite_report
            self.assertEqual(report.stage, "input")
            self.assertEqual((report.batch, report.rows), (1, (0, 3)))
            self.assertEqual(report.note, name)

    @pytest.mark.thorough
    def test_all_micro_batches_with_bad_rows(self):
        model = accumulating(sequential(keras.layers.Dense(1)), **WAYS[1])
        data = batches()
        data[1] = spoiled(data[1], np.nan, [1, 2])
        fit(model, data)
        self.assertEqual(model.nonfinite_report.rows, (1, 2))

    @pytest.mark.thorough
    def test_loss(self):
        def loss(y, y_pred):
            return tf.sqrt(tf.abs(y - tf.stop_gradient(y) + 0.0 * y_pred))

        model = accumulating(sequential(keras.layers.Dense(1)))
        model.compile("sgd", loss)
        fit(model, batches())
        report = model.nonfinite_report
        self.assertEqual((report.stage, report.layer), ("loss", None))
        self.assertEqual((report.batch, report.rows), (0, (0, 1, 2, 3)))

    def test_weights(self):
        model = accumulating(sequential(keras.layers.Dense(1, name="mine")))
        model.layers[-1].kernel.assign([[np.inf], [0.0], [0.0]])
        fit(model, batches())
        report = model.nonfinite_report
        self.assertEqual(report.stage, "weights")
        self.assertEndsWith(report.layer, "mine/kernel")

    @pytest.mark.thorough
    def test_missing_values_that_a_layer_replaces(self):
        class Replace(keras.layers.Layer):
            def call(self, x):
                return tf.where(tf.math.is_nan(x), 1.0, x)

        model = accumulating(
            sequential(Replace(), Logarithm(name="mine"), keras.layers.Dense(1))
        )
        data = batches()
        data[0] = spoiled(data[0], np.nan, [0])
        data[1] = spoiled(spoiled(data[1], np.nan, [0]), 0.0, [2])
        fit(model, data)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.stage), (1, "forward"))
        self.assertEqual(report.rows, (2,))

    def test_of_two_layers_with_the_same_inputs(self):
        inputs = keras.Input((FEATURES,))
        hidden = Scale()(inputs)
        outputs = keras.layers.Dense(1)(
            keras.layers.Concatenate()(
                [
                    Root(name="mine")(hidden),
                    keras.layers.Dense(1, name="later")(hidden),
                ]
            )
        )
        model = accumulating(keras.Model(inputs, outputs))
        data = batches()
        data[1] = spoiled(data[1], 1.5, [3])
        fit(model, data)
        self.assertEqual(model.nonfinite_report.layer, "mine")

    @pytest.mark.thorough
    def test_overflow_of_the_scaled_gradient(self):
        for policy in POLICIES:
            keras.utils.set_random_seed(0)
            model = sequential(
                keras.layers.Dense(4, dtype="mixed_float16"),
                keras.layers.Dense(1, dtype="mixed_float16"),
            )
            model = accumulating(model, policy)
            model.compile(
                keras.optimizers.LossScaleOptimizer(
                    keras.optimizers.SGD(0.01), initial_scale=2.0**24
                ),
                "mse",
            )
            fit(model, batches())
            report = model.nonfinite_report
            self.assertEqual(report.batch, 0)
            # In half precision, the first gradient of all is infinite.
            self.assertEqual(report.stage, "loss")
            self.assertRegex(report.note, "with the loss scale .* it overflows")


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(2)
        self.mine = Logarithm(name="mine")
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(self.mine(tf.abs(0.0 * self.first(x)) + x[:, :2]))


def functional():
    inputs = keras.Input((FEATURES,))
    outputs = keras.layers.Dense(1)(Logarithm(name="mine")(inputs))
    return keras.Model(inputs, outputs)


def nested():
    inner = sequential(Logarithm(name="mine"), keras.layers.Dense(2))
    return sequential(Scale(), inner, keras.layers.Dense(1))


def with_an_operation():
    inputs = keras.Input((FEATURES,))
    hidden = keras.ops.log(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def recurrent():
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Reshape((FEATURES, 1))(Logarithm(name="mine")(inputs))
    hidden = keras.layers.Masking(-1.0)(hidden)
    return keras.Model(
        inputs, keras.layers.Dense(1)(keras.layers.GRU(2)(hidden))
    )


class ModelTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(
        ("subclassed", Subclassed, "mine"),
        ("functional", functional, "mine"),
        ("nested", nested, "mine"),
        ("operation", with_an_operation, "log"),
        ("recurrent", recurrent, "mine"),
    )
    @test_utils.first_command("_subclassed", second=("_nested", "_recurrent"))
    def test_kinds_of_models(self, make, name):
        model = accumulating(make())
        model.run_eagerly = make is Subclassed
        data = batches()
        data[1] = spoiled(data[1], 0.0, [0, 2])
        fit(model, data)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (1, (0, 2)))
        self.assertEqual(report.stage, "forward")
        self.assertEndsWith(report.layer, name)

    def test_train_step_of_ones_own(self):
        class Own(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((y - self(x, training=True)) ** 2)
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"loss": loss}

        value, model = named("backward")
        model = Own(
            model.inputs[0],
            model.outputs,
            accum_steps=2,
            nonfinite="skip_microbatch",
        )
        model.compile("sgd")
        data = batches()
        data[1] = spoiled(data[1], value, [3])
        fit(model, data)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (1, (3,)))
        self.assertEqual(report.stage, "backward")

    def test_what_cannot_be_called_again(self):
        class Once(keras.layers.Layer):
            def call(self, x):
                if tf.executing_eagerly():
                    raise ValueError("Not twice.")
                return x

        model = accumulating(sequential(Once(), keras.layers.Dense(1)))
        data = batches()
        data[1] = spoiled(data[1], np.nan, [3])
        fit(model, data)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.stage), (1, "unknown"))
        self.assertIn("could not be computed again", report.note)
        self.assertEqual(test_utils.num_updates(model.optimizer), 2)

    @pytest.mark.thorough
    def test_two_replicas(self):
        strategy, reason = test_utils.chosen_strategy()
        if reason:
            self.skipTest(reason)
        if strategy.num_replicas_in_sync != 2:
            self.skipTest("For two replicas.")
        with strategy.scope():
            model = accumulating(functional(), jit_compile=True)
        data = batches()
        data[1] = spoiled(data[1], 0.0, [0, 3])
        # The second one has the last two rows.
        data[2] = spoiled(data[2], 0.0, [3])
        dataset = test_utils.dataset(data, known_length=True)
        model.fit(dataset, verbose=0)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (1, (0,)))
        dataset = test_utils.dataset([data[2], data[0]], known_length=True)
        model.fit(dataset, verbose=0)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (0, (3,)))


class FitTest(test_utils.TestCase, parameterized.TestCase):
    def bad_model(self, **kwargs):
        return accumulating(functional(), **kwargs)

    def bad_data(self):
        data = batches()
        data[1] = spoiled(data[1], 0.0, [2])
        return data

    def test_nothing_is_said_of_what_is_finite(self):
        model = self.bad_model()
        with self.assertNoLogs("absl", "WARNING"):
            fit(model, batches())
        self.assertIsNone(model.nonfinite_report)

    def test_each_epoch_and_each_fit(self):
        model = self.bad_model()
        bad = self.bad_data()
        with self.assertLogs("absl", "WARNING") as logs:
            # Later ones in an epoch are counted alone.
            history = fit(model, [*bad, bad[1]], epochs=2)
        self.assertEqual(history.history["nonfinite_microbatches"], [2, 2])
        self.assertLen(logs.output, 2)
        self.assertEqual(model.nonfinite_report.epoch, 1)
        fit(model, batches())
        self.assertIsNone(model.nonfinite_report)

    def test_a_window_that_the_end_of_the_epoch_cuts(self):
        model = self.bad_model(policy="skip_window", accum_steps=2)
        data = self.bad_data()
        fit(model, [data[0], data[0], data[1]])
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (2, (2,)))

    def test_train_on_batch(self):
        model = self.bad_model()
        test_utils.train_on(model, self.bad_data())
        report = model.nonfinite_report
        self.assertIsNone(report.epoch)
        self.assertEqual((report.batch, report.rows), (1, (2,)))
        self.assertEqual(report.stage, "forward")

    def test_by_hand(self):
        model = self.bad_model()
        model.accumulate(
            [np.nan * tf.ones(v.shape) for v in model.trainable_weights], 1.0
        )
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.stage), (None, "unknown"))

    def test_several_steps_in_an_execution(self):
        model = self.bad_model()
        model.compile("sgd", "mse", steps_per_execution=2, jit_compile=False)
        bad = self.bad_data()
        fit(model, [*batches(2), *bad])
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.stage), ((2, 3), "unknown"))

    @pytest.mark.thorough
    def test_a_generator(self):
        model = self.bad_model()
        model.fit((batch for batch in self.bad_data()), verbose=0)
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (1, (2,)))

    def test_propagate_holds_nothing(self):
        model = self.bad_model(policy="propagate")
        fit(model, self.bad_data())
        self.assertIsNone(model.nonfinite_report)
        self.assertTrue(np.isnan(model.get_weights()[0]).any())

    @parameterized.parameters(*POLICIES)
    @test_utils.first_command(0)
    def test_changes_nothing(self, policy):
        """The replay leaves all state as it was, to the bit."""

        def train():
            keras.utils.set_random_seed(3)
            model = accumulating(
                sequential(
                    keras.layers.Dense(4),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dropout(0.5),
                    keras.layers.GaussianNoise(0.1),
                    keras.layers.Dense(1),
                ),
                policy,
            )
            data = batches()
            data[1] = spoiled(data[1], np.nan, [2])
            history = fit(model, data)
            return test_utils.all_state(model), history.history, model

        state, history, model = train()
        self.assertEqual(model.nonfinite_report.stage, "input")
        with mock.patch.object(watch.Watch, "look", lambda self, it: it.logs):
            expected, expected_history, _ = train()
        self.assertAllClose(state, expected, 0, 0)
        self.assertEqual(history, expected_history)

    @parameterized.parameters(*POLICIES)
    @test_utils.first_command(1)
    def test_counts_that_a_device_still_computes(self, policy):
        with mock.patch.object(watch, "are_at_hand", lambda counts: False):
            model = self.bad_model(policy=policy)
            fit(model, self.bad_data() + batches(6))
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.rows), (1, (2,)))

    @pytest.mark.thorough
    def test_batches_that_are_too_large_to_be_held(self):
        model = self.bad_model(policy="skip_window", accum_steps=4)
        with mock.patch.object(watch, "LIMIT", 100):
            fit(model, self.bad_data())
        report = model.nonfinite_report
        self.assertEqual((report.batch, report.stage), ((0, 3), "unknown"))


class ReportTest(test_utils.TestCase):
    def test_sentence(self):
        for report, expected in (
            (
                NonfiniteReport(1, 2, (3,), "a/b", "forward"),
                "epoch 1, batch 2, row 3; it began in the outputs of `a/b`.",
            ),
            (
                NonfiniteReport(0, (4, 7), note="all is finite"),
                "epoch 0, one of batches 4 to 7; it cannot be told where it "
                "began: all is finite.",
            ),
            (
                NonfiniteReport(None, 0, tuple(range(10)), stage="input"),
                "batch 0, rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more; the batch "
                "itself is not finite.",
            ),
        ):
            self.assertEqual(
                str(report), f"Gradients were not finite: {expected}"
            )


if __name__ == "__main__":
    tf.test.main()
