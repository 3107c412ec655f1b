"""Tests of what `fit` reports of windows."""

import csv
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

import keras_accum
from tests import test_utils

UNEVEN = [8, 8, 8, 1, 8, 3, 8, 4]
BOTH = ("gradient_norm", "gradient_noise_scale")


def frozen(optimizer=keras.optimizers.SGD, **kwargs):
    """An optimizer that moves nothing: each window is of the same weights."""
    return optimizer(0.0, **kwargs)


def flat(gradients):
    return np.concatenate([np.ravel(each) for each in gradients])


def of_rows(losses_of_rows, variables):
    """The gradient of each row's loss; a matrix."""
    with tf.GradientTape() as tape:
        losses = losses_of_rows()
    rows = tape.jacobian(losses, [each.value for each in variables])
    rows = [tf.reshape(each, [len(losses), -1]) for each in rows]
    return np.concatenate(rows, axis=1)


def truth(rows, weights=None):
    """The noise scale of rows that are drawn at random, with their weights."""
    weights = np.ones(len(rows)) if weights is None else weights
    mean = weights @ rows / weights.sum()
    spread = ((rows - mean) ** 2).sum(1)
    return (weights**2 @ spread / weights.sum()) / (mean @ mean)


class Draws:
    """Batches of rows that are drawn at random from a pool."""

    def __init__(self, *pool, sizes=UNEVEN, seed=0):
        self.pool, self._sizes = pool, sizes
        self._rng = np.random.default_rng(seed)

    def __call__(self, number):
        """Makes a data set of a number of batches."""
        batches = []
        for index in range(number):
            size = self._sizes[index % len(self._sizes)]
            rows = self._rng.integers(0, len(self.pool[0]), size)
            batches.append(tuple(part[rows] for part in self.pool))
        signature = tuple(
            tf.TensorSpec((None, *part.shape[1:]), part.dtype)
            for part in self.pool
        )
        return tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=signature
        )


def regression(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype("float32")
    y = x @ rng.normal(size=(6, 1)) + rng.normal(size=(rows, 1))
    return x, y.astype("float32")


def mlp(**kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(5, activation="tanh")(inputs)
    outputs = keras.layers.Dense(1)(hidden)
    kwargs.setdefault("window_metrics", BOTH)
    return keras_accum.GradientAccumulationModel(inputs, outputs, **kwargs)


def squared_errors(model, x, y):
    return tf.reduce_sum((model(x) - y) ** 2, axis=-1)


def last(history):
    return {name: values[-1] for name, values in history.history.items()}


class NormTest(tf.test.TestCase):
    def check(self, jit_compile, **way):
        x, y = regression(40)
        model = mlp(**way)
        model.compile(frozen(clipnorm=1e-3), "mse", jit_compile=jit_compile)
        size = 40 if "microbatch_size" in way else 8
        history = model.fit(x, y, batch_size=size, verbose=0)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(squared_errors(model, x, y))
        gradients = tape.gradient(loss, model.trainable_variables)
        expected = np.linalg.norm(flat(gradients))
        found = history.history["gradient_norm"]
        self.assertAllClose(found, [expected], rtol=1e-5)

    def test_is_that_of_the_large_batch(self):
        self.check(False, accum_steps=5)
        self.check(True, microbatch_size=7)

    @pytest.mark.thorough
    def test_is_that_of_the_large_batch_in_other_ways(self):
        self.check(True, accum_steps=5)
        self.check(False, microbatch_size=7)
        self.check(True, effective_batch_size=40)

    def test_is_the_mean_of_an_epochs_windows(self):
        x, y = regression(32)
        model = mlp(accum_steps=2, window_metrics="gradient_norm")
        model.compile(frozen(), "mse", jit_compile=False)
        seen = []
        history = model.fit(
            x,
            y,
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: seen.append(
                        logs["gradient_norm"]
                    )
                )
            ],
        )
        self.assertTrue(np.isnan(seen[0]))
        norms = []
        for rows in (slice(0, 16), slice(16, 32)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(squared_errors(model, x[rows], y[rows]))
            gradient = tape.gradient(loss, model.trainable_variables)
            norms.append(np.linalg.norm(flat(gradient)))
        self.assertAllClose(seen[1:3], [norms[0]] * 2, rtol=1e-5)
        found = history.history["gradient_norm"]
        self.assertAllClose(found, [np.mean(norms)] * 2, rtol=1e-5)

    def test_without_windows_of_several(self):
        x, y = regression(8)
        model = mlp(window_metrics=["gradient_norm"])
        model.compile(frozen(), "mse", jit_compile=False)
        norm = last(model.fit(x, y, batch_size=8, verbose=0))["gradient_norm"]
        self.assertGreater(norm, 0.0)

    @pytest.mark.thorough
    def test_loss_scales(self):
        x, y = regression(16)
        norms = []
        for optimizer in (
            frozen(),
            keras.optimizers.LossScaleOptimizer(frozen()),
            frozen(loss_scale_factor=64.0),
        ):
            model = mlp(accum_steps=2, window_metrics=(*BOTH, of_first))
            model.compile(optimizer, "mse", jit_compile=False)
            logs = last(model.fit(x, y, 8, verbose=0, shuffle=False))
            norms.append([logs["gradient_norm"], logs["of_first"]])
        self.assertAllClose(norms, norms[:1] * 3, rtol=1e-5)

    def test_an_overflow_is_left_out(self):
        x, y = regression(32)
        x[:8] = 1e30
        model = mlp(accum_steps=2)
        scaled = keras.optimizers.LossScaleOptimizer(frozen())
        model.compile(scaled, "mse", jit_compile=False)
        logs = last(model.fit(x, y, 8, verbose=0, shuffle=False))
        self.assertTrue(np.isfinite(logs["gradient_norm"]))

    @pytest.mark.thorough
    def test_several_optimizers(self):
        x, y = regression(16)

        class Two(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(squared_errors(self, x, y))
                weights = self.trainable_weights
                gradients = tape.gradient(loss, weights)
                pairs = list(zip(gradients, weights, strict=True))
                self.accumulate(pairs[:2], tf.shape(x)[0])
                self.accumulate(pairs[2:], tf.shape(x)[0], self.other)
                return {"loss": loss}

        plain = mlp(accum_steps=2)
        plain.compile(frozen(), "mse", jit_compile=False)
        two = Two(plain.input, plain.output, accum_steps=2, window_metrics=BOTH)
        two.other = frozen()
        two.compile(frozen(), "mse", jit_compile=False)
        found, expected = (
            last(model.fit(x, y, 4, shuffle=False, verbose=0))
            for model in (two, plain)
        )
        for name in BOTH:
            self.assertAllClose(found[name], expected[name], rtol=1e-4)


def of_first(gradients):
    return tf.norm(gradients[0])


class FunctionTest(tf.test.TestCase):
    def test_gets_the_mean_gradients(self):
        x, y = regression(40)
        lengths = []

        def largest(gradients):
            lengths.append(len(gradients))
            return tf.reduce_max(tf.abs(gradients[-1]))

        model = mlp(accum_steps=5, window_metrics=(largest, of_first))
        model.compile(frozen(), "mse", jit_compile=False)
        logs = last(model.fit(x, y, batch_size=8, verbose=0))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(squared_errors(model, x, y))
        gradients = tape.gradient(loss, model.trainable_variables)
        self.assertAllClose(logs["largest"], abs(gradients[-1][0]), rtol=1e-5)
        self.assertAllClose(logs["of_first"], tf.norm(gradients[0]), rtol=1e-5)
        self.assertEqual(set(lengths), {4})

    def test_errors(self):
        for metrics, error in (
            ("norm", "must be of"),
            ([1], "must be of"),
            ([of_first, of_first], "different names"),
        ):
            with self.assertRaisesRegex(ValueError, error):
                mlp(accum_steps=2, window_metrics=metrics)

    def test_names_of_a_step_are_not_taken(self):
        def loss(gradients):
            return tf.norm(gradients[0])

        self.assertFails(loss, r"already.*\['loss'\]")

    def test_returns_a_scalar(self):
        def both(gradients):
            return tf.stack([tf.norm(gradients[0]), tf.norm(gradients[1])])

        self.assertFails(both, r"`both` must .* shape \(2,\)")

    def assertFails(self, metric, error):
        x, y = regression(16)
        model = mlp(accum_steps=2, window_metrics=metric)
        model.compile(frozen(), "mse", jit_compile=False)
        with self.assertRaisesRegex(ValueError, error):
            model.fit(x, y, batch_size=8, verbose=0)

    def test_may_be_set_at_any_time(self):
        x, y = regression(40)
        model = mlp(accum_steps=5, window_metrics=())
        model.compile(frozen(), "mse", jit_compile=False)
        self.assertNotIn("gradient_norm", last(model.fit(x, y, 8, verbose=0)))
        self.assertEmpty(model._accumulation.window["noise"].variables)
        self.assertEmpty(model._accumulation.window["told"].variables)
        model.window_metrics = BOTH
        logs = last(model.fit(x, y, batch_size=8, verbose=0))
        self.assertGreater(logs["gradient_noise_scale"], 0.0)
        model.window_metrics = None
        self.assertEqual(model.window_metrics, ())
        self.assertNotIn("gradient_norm", last(model.fit(x, y, 8, verbose=0)))


class NoiseTest(tf.test.TestCase):
    """Against the truth, from the gradients of single rows."""

    def check(self, model, data, expected, batches, tolerance=0.1, **compiled):
        model.compile(frozen(), **compiled)
        logs = last(model.fit(data(batches), verbose=0))
        low, high = (
            logs[f"gradient_noise_scale_{end}"] for end in ("low", "high")
        )
        # A moving mean over 150 windows is off by some 5 %.
        found = logs["gradient_noise_scale"]
        self.assertAllClose(found, expected, rtol=tolerance)
        self.assertBetween(expected, 0.97 * low, 1.03 * high)

    def test_uneven_micro_batches(self):
        pool = regression()
        model = mlp(accum_steps=8)
        rows = of_rows(
            lambda: squared_errors(model, *pool), model.trainable_variables
        )
        self.check(
            model,
            Draws(*pool),
            truth(rows),
            1600,
            loss="mse",
            jit_compile=False,
        )

    @pytest.mark.thorough
    def test_microbatch_size_and_weights(self):
        pool = regression()
        weights = np.random.default_rng(5).uniform(0.2, 2.0, (200,))
        pool = (*pool, weights.astype("float32"))
        model = mlp(microbatch_size=6)
        rows = of_rows(
            lambda: squared_errors(model, *pool[:2]), model.trainable_variables
        )
        self.check(
            model,
            Draws(*pool, sizes=[44, 50, 38]),
            truth(rows, weights),
            200,
            loss=keras.losses.MeanSquaredError(
                reduction="mean_with_sample_weight"
            ),
            jit_compile=True,
        )

    def tokens(self):
        """Rows of six tokens, some of them masked."""
        rng = np.random.default_rng(3)
        x = rng.integers(1, 9, (150, 6))
        lengths = rng.integers(1, 7, (150, 1))
        x[np.arange(6) >= lengths] = 0
        y = np.where(
            rng.random(x.shape) < 0.6, x % 3, rng.integers(0, 3, x.shape)
        )
        return x.astype("int32"), y.astype("int32")

    def model_of_tokens(self, **kwargs):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((6,), dtype="int32")
        hidden = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
        outputs = keras.layers.Dense(3)(hidden)
        return keras_accum.GradientAccumulationModel(
            inputs, outputs, window_metrics=BOTH, **kwargs
        )

    def truth_of_tokens(self, model, x, y):
        loss = test_utils.crossentropy(reduction="none")
        keep = np.flatnonzero(x.ravel())
        rows = of_rows(
            lambda: tf.gather(tf.reshape(loss(y, model(x)), [-1]), keep),
            model.trainable_variables,
        )
        return truth(rows)

    @pytest.mark.thorough
    def test_masked_tokens(self):
        pool = self.tokens()
        model = self.model_of_tokens(accum_steps=8)
        self.check(
            model,
            Draws(*pool),
            self.truth_of_tokens(model, *pool),
            1600,
            loss=test_utils.crossentropy(),
            jit_compile=False,
        )

    @pytest.mark.thorough
    def test_masked_tokens_in_micro_batches(self):
        pool = self.tokens()
        model = self.model_of_tokens(microbatch_size=7)
        self.check(
            model,
            Draws(*pool, sizes=[50]),
            self.truth_of_tokens(model, *pool),
            200,
            loss=test_utils.crossentropy(),
            jit_compile=True,
        )

    @pytest.mark.thorough
    def test_losses_that_differ(self):
        pool = regression()
        weights = np.random.default_rng(5).uniform(0.5, 1.5, (200,))
        found = []
        for way, size in (
            ({"accum_steps": 4}, 12),
            ({"microbatch_size": 12}, 48),
        ):
            keras.utils.set_random_seed(1)
            inputs = keras.Input((6,))
            hidden = keras.layers.Dense(5, activation="tanh")(inputs)
            outputs = [keras.layers.Dense(1)(hidden) for _ in range(2)]
            model = keras_accum.GradientAccumulationModel(
                inputs, outputs, window_metrics=BOTH, **way
            )
            mean = keras.losses.MeanSquaredError
            model.compile(
                frozen(),
                [mean(), mean(reduction="mean_with_sample_weight")],
                jit_compile=False,
            )
            x, y = pool
            history = model.fit(
                x[:192],
                [y[:192], -y[:192]],
                batch_size=size,
                epochs=2,
                sample_weight=[np.ones(192), weights[:192]],
                shuffle=False,
                verbose=0,
            )
            logs = last(history)
            found.append([logs[name] for name in BOTH])
        self.assertAllClose(*found, rtol=1e-3)
        rows = of_rows(
            lambda: tf.add_n(
                [
                    tf.reduce_sum((out - sign * y) ** 2, -1) * weight
                    for out, sign, weight in zip(
                        model(x),
                        (1, -1),
                        (1.0, weights.astype("float32") / weights.mean()),
                        strict=True,
                    )
                ]
            ),
            model.trainable_variables,
        )
        # Of four windows that are the same in each epoch, not of 200.
        self.assertAllClose(found[0][1], truth(rows), rtol=0.5)

    @pytest.mark.thorough
    def test_a_sum_counts_rows(self):
        x, y = regression(64)
        found = []
        for reduction in ("sum", "sum_over_batch_size"):
            model = mlp(accum_steps=4)
            loss = keras.losses.MeanSquaredError(reduction=reduction)
            model.compile(frozen(), loss, jit_compile=False)
            logs = last(model.fit(x, y, 8, shuffle=False, verbose=0))
            found.append(logs["gradient_noise_scale"])
        self.assertAllClose(*found, rtol=1e-4)

    def test_steps_of_ones_own(self):
        class Own(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                for half in (slice(0, 3), slice(3, None)):
                    with tf.GradientTape() as tape:
                        errors = squared_errors(self, x[half], y[half])
                        loss = tf.reduce_mean(errors)
                    weights = self.trainable_weights
                    rows = tf.shape(errors)[0]
                    self.accumulate(tape.gradient(loss, weights), rows)
                return {"loss": loss}

        x, y = regression(64)
        plain = mlp(accum_steps=4)
        plain.compile(frozen(), "mse", jit_compile=False)
        own = Own(plain.input, plain.output, accum_steps=4, window_metrics=BOTH)
        own.compile(frozen(), "mse", jit_compile=False)
        for name, value in last(
            own.fit(x, y, 8, shuffle=False, verbose=0)
        ).items():
            if name in BOTH:
                logs = last(plain.fit(x, y, 8, shuffle=False, verbose=0))
                self.assertAllClose(value, logs[name], rtol=1e-4)

    def test_of_a_loss_that_couples_rows_nothing_is_known(self):
        x, y = regression(64)

        def coupled(y_true, y_pred):
            return tf.reduce_max(tf.reduce_sum(y_true * y_pred, -1))

        for way, size in (
            ({"accum_steps": 4}, 8),
            ({"microbatch_size": 8}, 32),
        ):
            model = mlp(**way)
            model.compile(frozen(), coupled, jit_compile=False)
            with self.assertWarnsRegex(UserWarning, "noise scale is not"):
                logs = last(model.fit(x, y, size, verbose=0))
            self.assertTrue(np.isnan(logs["gradient_noise_scale"]))
            self.assertGreater(logs["gradient_norm"], 0.0)

    @pytest.mark.thorough
    def test_what_is_skipped_does_not_count(self):
        x, y = regression(96)
        expected = mlp(accum_steps=3)
        expected.compile(frozen(), "mse", jit_compile=False)
        good = last(expected.fit(x[:72], y[:72], 8, shuffle=False, verbose=0))
        bad = np.concatenate([x[:72], np.full((8, 6), np.nan), x[80:]])
        model = mlp(accum_steps=3, nonfinite="skip_window")
        model.compile(frozen(), "mse", jit_compile=False)
        logs = last(model.fit(bad, y, 8, shuffle=False, verbose=0))
        for name in BOTH:
            self.assertAllClose(logs[name], good[name], rtol=1e-5)
        # Two micro-batches are left of the last window.
        model = mlp(accum_steps=3, nonfinite="skip_microbatch")
        model.compile(frozen(), "mse", jit_compile=False)
        logs = last(model.fit(bad, y, 8, shuffle=False, verbose=0))
        left = mlp(accum_steps=3)
        left.compile(frozen(), "mse", jit_compile=False)
        rest = [np.concatenate([each[:72], each[80:]]) for each in (x, y)]
        good = last(left.fit(*rest, 8, shuffle=False, verbose=0))
        for name in BOTH:
            self.assertAllClose(logs[name], good[name], rtol=1e-5)


class ReplicasTest(tf.test.TestCase):
    def test_are_those_of_one_device(self):
        self.check(accum_steps=4, jit_compile=False)

    @test_utils.at_night
    def test_are_those_of_one_device_in_other_ways(self):
        self.check(accum_steps=4, jit_compile=True)
        self.check(microbatch_size=4, jit_compile=False)
        self.check(microbatch_size=4, jit_compile=True)

    def check(self, jit_compile, **way):
        x, y = regression(96)
        strategy = test_utils.chosen_strategy()[0]
        replicas = strategy.num_replicas_in_sync
        found = []
        for scope, share in ((strategy, 1), (None, replicas)):
            with (scope or tf.distribute.get_strategy()).scope():
                ways = dict(way)
                if share > 1 and "accum_steps" in way:
                    ways["accum_steps"] *= share
                model = mlp(**ways, window_metrics=(*BOTH, of_first))
                model.compile(frozen(), "mse", jit_compile=jit_compile)
            size = 32 if "microbatch_size" in way else 8 // share
            history = model.fit(x, y, size, epochs=2, shuffle=False, verbose=0)
            found.append(last(history))
        for name in (*BOTH, "of_first"):
            self.assertAllClose(found[0][name], found[1][name], rtol=1e-4)


class LogsTest(tf.test.TestCase):
    def test_all_callbacks_see_them(self):
        x, y = regression(64)
        folder = self.get_temp_dir()
        table = os.path.join(folder, "log.csv")
        model = mlp(accum_steps=2)
        model.compile(frozen(), "mse", jit_compile=False)
        model.fit(
            x,
            y,
            8,
            epochs=2,
            verbose=0,
            callbacks=[
                keras.callbacks.CSVLogger(table),
                keras.callbacks.TensorBoard(folder, update_freq="epoch"),
                keras.callbacks.EarlyStopping("gradient_norm", mode="min"),
            ],
        )
        with open(table, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name in (*BOTH, "gradient_noise_scale_low"):
            self.assertGreater(float(rows[-1][name]), 0.0)
        events = [
            os.path.join(path, file)
            for path, _, files in os.walk(folder)
            for file in files
            if "events" in file
        ]
        tags = {
            value.tag
            for file in events
            for event in tf.compat.v1.train.summary_iterator(file)
            for value in event.summary.value
        }
        self.assertIn("epoch_gradient_norm", tags)
        self.assertIn("epoch_gradient_noise_scale", tags)

    @pytest.mark.thorough
    def test_evaluate_and_validation_have_none(self):
        x, y = regression(32)
        model = mlp(accum_steps=2)
        model.compile(frozen(), "mse", jit_compile=False)
        history = model.fit(x, y, 8, validation_data=(x, y), verbose=0)
        self.assertNotIn("val_gradient_norm", history.history)
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        self.assertNotIn("gradient_norm", logs)

    def test_one_reduction(self):
        strategy = test_utils.chosen_strategy()[0]
        with strategy.scope():
            model = mlp(accum_steps=2)
            model.compile(frozen(), "mse", jit_compile=False)
        x, y = regression(64)
        model.fit(x, y, 8, verbose=0)
        sums = model._accumulation.window["noise"].sums()
        # The share of a replica, the counts, and what the one loss has.
        self.assertEqual([list(each.shape) for each in sums], [[2], [2], []])


class AdviceTest(tf.test.TestCase):
    def said(self, sizes, noise=0.5, **way):
        """Returns what is logged of windows, with noise in the labels."""
        rng = np.random.default_rng(0)
        x = np.ones((640, 6), "float32")
        y = 1.0 + noise * rng.normal(size=(640, 1)).astype("float32")
        model = mlp(**way)
        model.compile(frozen(), "mse", jit_compile=False)
        with self.assertLogs("absl", "WARNING") as logged:
            logging.warning("One line at least.")
            model.fit(x, y, sizes, epochs=2, verbose=0)
        return [each.getMessage() for each in logged.records[1:]]

    @pytest.mark.thorough
    def test_a_window_far_beyond(self):
        (text,) = self.said(4, accum_steps=32)
        self.assertRegex(
            text,
            r"^The gradient noise scale is \S+ \(from \S+ to \S+\), and a "
            r"window has 128. A window of \d micro-batches instead of 32 would",
        )
        (text,) = self.said(4, effective_batch_size=128)
        self.assertIn("`effective_batch_size=", text)

    def test_a_batch_far_beyond(self):
        (text,) = self.said(128, microbatch_size=8)
        self.assertRegex(text, r"\d % of the rows|\d+% of the rows")

    @pytest.mark.thorough
    def test_others(self):
        self.assertEmpty(self.said(4, noise=9.0, accum_steps=32))
        self.assertEmpty(
            self.said(4, accum_steps=32, window_metrics="gradient_norm")
        )


class SavingTest(tf.test.TestCase):
    def test_goes_on_in_mid_window(self):
        x, y = regression(96)
        path = os.path.join(self.get_temp_dir(), "model.keras")

        def make():
            model = mlp(accum_steps=4, partial_window="carry")
            model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
            return model

        model = make()
        kwargs = {"batch_size": 8, "shuffle": False, "verbose": 0}
        model.fit(x[:48], y[:48], **kwargs)
        model.save(path)
        expected = last(model.fit(x[48:], y[48:], **kwargs))
        again = keras.saving.load_model(path)
        self.assertEqual(again.window_metrics, BOTH)
        logs = last(again.fit(x[48:], y[48:], **kwargs))
        for name in BOTH:
            self.assertAllClose(logs[name], expected[name], rtol=1e-6)

    def test_functions_are_saved(self):
        registered = keras.saving.register_keras_serializable("tests")(of_first)
        model = mlp(accum_steps=4, window_metrics=[registered, np.sum])
        config = keras_accum.GradientAccumulationModel.from_config(
            model.get_config()
        )
        self.assertEqual(config.window_metrics, (registered,))
        clone = keras.models.clone_model(model)
        self.assertEqual(clone.window_metrics, (registered, np.sum))

    def test_a_window_begun_without_is_left_out(self):
        x, y = regression(64)
        model = mlp(accum_steps=4, window_metrics=(), partial_window="carry")
        model.compile(frozen(), "mse", jit_compile=False)
        model.fit(x[:16], y[:16], 8, verbose=0)
        model.window_metrics = BOTH
        logs = last(model.fit(x[16:32], y[16:32], 8, verbose=0))
        self.assertTrue(np.isnan(logs["gradient_noise_scale"]))
        self.assertGreater(logs["gradient_norm"], 0.0)
        logs = last(model.fit(x[32:], y[32:], 8, verbose=0))
        self.assertFalse(np.isnan(logs["gradient_noise_scale"]))


if __name__ == "__main__":
    tf.test.main()
