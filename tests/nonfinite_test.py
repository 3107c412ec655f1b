import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils

WINDOW = 3


def compiled(model, jit_compile=False, optimizer="adam", **loss_args):
    """Compiles a model of `test_utils`, with a metric, and returns it."""
    if optimizer == "adam":
        optimizer = keras.optimizers.Adam(0.01)
    model.compile(
        optimizer,
        loss=test_utils.crossentropy(**loss_args),
        jit_compile=jit_compile,
        weighted_metrics=["accuracy"],
    )
    return model


def accumulating(policy="skip_microbatch", accum_steps=WINDOW, **kwargs):
    return test_utils.accumulating(
        accum_steps=accum_steps, nonfinite=policy, **kwargs
    )


def normalized(cls=keras.Model, **kwargs):
    """Returns a classifier with BatchNorm and a dead end without gradients."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((test_utils.FEATURES,))
    hidden = keras.layers.Dense(8)(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    outputs = keras.layers.Dense(test_utils.CLASSES)(hidden)
    return cls(inputs, outputs, **kwargs)


def spoiled(batch, value=np.nan):
    """Returns the batch with a row that is not finite."""
    x, y, *rest = batch
    x = x.copy()
    x[0, 0] = value
    return x, y, *rest


def iterations(model):
    return test_utils.num_updates(model.optimizer)


class SkipMicrobatchTest(test_utils.TestCase, parameterized.TestCase):
    def assertLikeWithout(
        self, batches, bad, make, value=np.nan, traces_reference=False
    ):
        """Trains with some micro-batches spoiled, and without them.

        Args:
            batches: The batches of one window.
            bad: Positions of the bad ones.
            make: Makes a model, of `accum_steps`.
            value: What they are spoiled with.
            traces_reference: Whether the model without them is no eager one.
        """
        rest = [b for i, b in enumerate(batches) if i not in bad]
        batches = [
            spoiled(b, value) if i in bad else b for i, b in enumerate(batches)
        ]
        actual, expected = make(len(batches)), make(len(rest))
        expected.run_eagerly = not traces_reference
        initial = actual.get_weights()
        # The second window begins where the buffers hold what is left.
        for _ in range(2):
            for batch in batches:
                actual_logs = actual.train_on_batch(*batch, return_dict=True)
            for batch in rest:
                logs = expected.train_on_batch(*batch, return_dict=True)
        self.assertSameTraining(actual, expected, initial)
        # They are of the last batch alone.
        if len(batches) - 1 not in bad:
            self.assertAllClose(actual_logs, logs, 1e-5, 1e-6)
        self.assertEqual(actual.nonfinite_microbatches, 2 * len(bad))

    @parameterized.parameters(
        ((0,), False), ((1,), False), ((2,), True), ((0, 2), False)
    )
    @test_utils.first_command(1, second=(2,))
    def test_each_position(self, bad, jit_compile):
        self.assertLikeWithout(
            test_utils.microbatches([4, 3, 2]),
            bad,
            lambda k: compiled(accumulating(accum_steps=k), jit_compile),
        )

    @parameterized.parameters(
        ((0,), True, "sum"),
        ((1,), False, "sum"),
        ((0,), False, "mean_with_sample_weight"),
    )
    @test_utils.first_command(2, second=(1,))
    def test_reductions(self, bad, jit_compile, reduction):
        batches = [
            (x, y, np.linspace(0.5, 2, len(x), dtype="float32"))
            for x, y in test_utils.microbatches([4, 3, 2])
        ]

        def make(k):
            # A regularizer of a sum counts once, in the first micro-batch.
            model = accumulating(accum_steps=k, regularizer="l2")
            return compiled(model, jit_compile, reduction=reduction)

        self.assertLikeWithout(batches, bad, make, np.inf)

    def test_eagerly(self):
        def make(k):
            model = compiled(accumulating(accum_steps=k), False)
            model.run_eagerly = True
            return model

        self.assertLikeWithout(test_utils.microbatches([4, 3, 2]), (0,), make)

    @pytest.mark.thorough
    def test_masked_rows_of_embeddings(self):
        bad = 0

        def make(k):
            keras.utils.set_random_seed(3)
            inputs = keras.Input((5,), dtype="int32")
            scale = keras.Input((1,))
            hidden = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
            outputs = keras.layers.Dense(test_utils.CLASSES)(hidden)
            outputs = outputs * scale[:, None]
            model = keras_accum.GradientAccumulationModel(
                [inputs, scale],
                outputs,
                accum_steps=k,
                nonfinite="skip_microbatch",
            )
            return compiled(model, False, optimizer="sgd")

        rng = np.random.default_rng(0)
        batches = [
            (
                [
                    rng.integers(0, 9, (n, 5)),
                    np.ones((n, 1), "float32"),
                ],
                rng.integers(0, test_utils.CLASSES, (n, 5)),
            )
            for n in (2, 4, 3)
        ]
        rest = [b for i, b in enumerate(batches) if i != bad]
        actual, expected = make(3), make(2)
        expected.run_eagerly = True
        initial = actual.get_weights()
        (ids, scale), y = batches[bad]
        batches[bad] = ([ids, scale * np.nan], y)
        test_utils.train_on(actual, batches)
        test_utils.train_on(expected, rest)
        self.assertSameTraining(actual, expected, initial)

    @parameterized.parameters(True, False)
    @test_utils.first_command(1, second=())
    def test_state_of_layers(self, jit_compile):
        self.assertLikeWithout(
            test_utils.microbatches([4, 3, 2]),
            (1,),
            lambda k: compiled(
                test_utils.accumulating(
                    normalized, accum_steps=k, nonfinite="skip_microbatch"
                ),
                jit_compile,
            ),
            # BatchNorm takes the bias back, of whose gradient's rounding Adam
            # makes a step of any size.
            traces_reference=True,
        )

    def test_no_update_if_all_are_bad(self):
        model = compiled(accumulating())
        batches = test_utils.microbatches([4] * WINDOW)
        # Momentum would go on without a gradient.
        test_utils.train_on(model, batches)
        before = test_utils.all_state(model)
        test_utils.train_on(model, map(spoiled, batches))
        self.assertAllEqual(
            [np.array_equal(a, b) for a, b in self.pairs(model, before)],
            [True] * len(before),
        )
        self.assertEqual(iterations(model), 1)
        test_utils.train_on(model, batches)
        self.assertEqual(iterations(model), 2)
        self.assertTrue(all(np.isfinite(s).all() for s in model.get_weights()))

    def pairs(self, model, before):
        return zip(test_utils.all_state(model), before, strict=True)

    def test_one_microbatch_per_window(self):
        model = compiled(accumulating(accum_steps=1))
        (batch,) = test_utils.microbatches([4])
        model.train_on_batch(*spoiled(batch))
        self.assertEqual(iterations(model), 0)
        model.train_on_batch(*batch)
        self.assertEqual(iterations(model), 1)

    def test_batches_in_microbatches(self):
        x, y = test_utils.concatenate(test_utils.microbatches([4, 4, 2]))
        kwargs = {"accum_steps": 1, "microbatch_size": 4}
        actual = compiled(accumulating(**kwargs), jit_compile=True)
        expected = compiled(accumulating(**kwargs))
        expected.run_eagerly = True
        initial = actual.get_weights()
        bad = x.copy()
        bad[5, 1] = np.nan
        rest = [0, 1, 2, 3, 8, 9]
        logs = actual.train_on_batch(bad, y, return_dict=True)
        self.assertAllClose(
            logs, expected.train_on_batch(x[rest], y[rest], return_dict=True)
        )
        self.assertSameTraining(actual, expected, initial)

    @pytest.mark.thorough
    def test_denominators_that_differ(self):
        inputs = keras.Input((4,), dtype="int32")
        embedded = keras.layers.Embedding(9, 3, mask_zero=True)(inputs)
        model = keras_accum.GradientAccumulationModel(
            inputs,
            [
                keras.layers.Dense(1)(embedded),
                keras.layers.Dense(1)(
                    keras.layers.GlobalAveragePooling1D()(embedded)
                ),
            ],
            microbatch_size=2,
            nonfinite="skip_microbatch",
        )
        model.compile("sgd", loss=["mse", "mse"])
        x = np.array([[1, 2, 0, 0], [1, 0, 0, 0], [1, 2, 3, 4]])
        y = [np.zeros((3, 4, 1)), np.zeros((3, 1))]
        with self.assertRaisesRegex(ValueError, "`nonfinite` must not be"):
            model.train_on_batch(x, y)

    def test_train_step_of_ones_own(self):
        class Own(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"loss": loss}

        def make(k):
            return compiled(
                test_utils.mlp(Own, accum_steps=k, nonfinite="skip_microbatch")
            )

        first, bad, last = test_utils.microbatches([4, 4, 4])
        actual, expected = make(3), make(2)
        expected.run_eagerly = True
        initial = actual.get_weights()
        test_utils.train_on(actual, [first, spoiled(bad), last])
        test_utils.train_on(expected, [first, last])
        self.assertSameTraining(actual, expected, initial)

    def test_calls_of_accumulate(self):
        model = compiled(accumulating())
        gradients = [tf.ones(v.shape) for v in model.trainable_weights]
        model.accumulate(gradients, 2.0)
        model.accumulate([np.nan * gradients[0], *gradients[1:]], 3.0)
        mean = test_utils.accumulator(model).mean()
        self.assertAllClose(mean, gradients)
        self.assertEqual(model.nonfinite_microbatches, 1)


class WideModelTest(test_utils.TestCase, parameterized.TestCase):
    """Gradients that are much larger than what they are products of."""

    @parameterized.parameters(
        (np.nan, True), (np.inf, False), (1e38, True), (1e4, True)
    )
    @test_utils.first_command(second=(0,))
    def test_a_wide_model(self, value, jit_compile):
        self.check(value, jit_compile)

    @parameterized.parameters(
        (np.nan, False), (np.inf, True), (1e38, False), (1e4, False)
    )
    @test_utils.first_command(1)
    @pytest.mark.thorough
    def test_a_wide_model_elsewhere(self, value, jit_compile):
        self.check(value, jit_compile)

    def check(self, value, jit_compile):
        def make(cls, **kwargs):
            keras.utils.set_random_seed(3)
            model = keras.Sequential(
                [keras.layers.Dense(128), keras.layers.Dense(3)]
            )
            model.build((None, 128))
            model = cls(*model.inputs, *model.outputs, **kwargs)
            optimizer = keras.optimizers.Adam(0.01)
            model.compile(optimizer, "mse", jit_compile=jit_compile)
            return model

        rng = np.random.default_rng(0)
        finite = rng.normal(size=(3, 2, 128)).astype("float32")
        targets = rng.normal(size=(4, 2, 3)).astype("float32")
        bad = finite[0].copy()
        bad[0, 0] = value
        model = make(
            keras_accum.GradientAccumulationModel,
            accum_steps=4,
            nonfinite="skip_microbatch",
        )
        expected = make(keras.Model)
        expected.run_eagerly = True
        initial = expected.get_weights()
        inputs = [finite[0], bad, *finite[1:]]
        for x, y in zip(inputs, targets, strict=True):
            model.train_on_batch(x, y)
        # Finite gradients count.
        counts = [0, 1, 2, 3] if value == 1e4 else [0, 2, 3]
        expected.train_on_batch(
            np.concatenate([inputs[i] for i in counts]),
            np.concatenate(targets[counts]),
        )
        self.assertSameTraining(model, expected, initial)
        self.assertEqual(model.nonfinite_microbatches, 4 - len(counts))


class SkipWindowTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters((0, True), (2, False))
    @test_utils.first_command(0)
    def test_no_update(self, position, jit_compile):
        model = compiled(
            test_utils.accumulating(
                normalized, accum_steps=WINDOW, nonfinite="skip_window"
            ),
            jit_compile,
        )
        batches = test_utils.microbatches([4] * WINDOW)
        test_utils.train_on(model, batches)
        before = [v.numpy() for v in model.optimizer.variables]
        weights = [v.numpy() for v in model.trainable_weights]
        bad = list(batches)
        bad[position] = spoiled(bad[position])
        test_utils.train_on(model, bad)
        self.assertAllClose(model.optimizer.variables, before, 0, 0)
        self.assertAllClose(model.trainable_weights, weights, 0, 0)
        self.assertEqual(iterations(model), 1)
        self.assertEqual(model.nonfinite_windows, 1)
        # Not even the moving statistics.
        self.assertTrue(all(np.isfinite(w).all() for w in model.get_weights()))
        test_utils.train_on(model, batches)
        self.assertEqual(iterations(model), 2)
        logs = model.get_metrics_result()
        self.assertTrue(np.isfinite(float(logs["loss"])))


class PropagateTest(test_utils.TestCase):
    def test_is_the_default(self):
        model = compiled(test_utils.accumulating(accum_steps=1))
        self.assertEqual(model.nonfinite, "propagate")
        model = compiled(test_utils.accumulating(accum_steps=2))
        first, last = test_utils.microbatches([4, 4])
        test_utils.train_on(model, [spoiled(first), last])
        self.assertTrue(all(np.isnan(w).any() for w in model.get_weights()))
        nonfinite = model._accumulation.window["nonfinite"]
        self.assertEmpty(nonfinite.variables)


class LossScalesTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("skip_microbatch", (1,), True),
        ("skip_microbatch", (0, 1, 2), False),
        ("skip_window", (1,), True),
    )
    @test_utils.first_command(0)
    def test_an_overflow_lowers_the_scale(self, policy, bad, jit_compile):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.01), initial_scale=64.0
        )
        model = compiled(accumulating(policy), jit_compile, optimizer)
        batches = test_utils.microbatches([4] * WINDOW)
        test_utils.train_on(model, batches)
        self.assertEqual(int(optimizer.step_counter), 1)
        weights = model.get_weights()
        test_utils.train_on(
            model,
            [spoiled(b) if i in bad else b for i, b in enumerate(batches)],
        )
        self.assertEqual(float(optimizer.dynamic_scale), 32.0)
        self.assertEqual(int(optimizer.step_counter), 0)
        has_updated = policy == "skip_microbatch" and len(bad) < WINDOW
        self.assertEqual(iterations(model), 1 + has_updated)
        if not has_updated:
            self.assertAllClose(model.get_weights(), weights, 0, 0)

    @pytest.mark.thorough
    def test_training_in_half_precision_gets_going(self):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), initial_scale=2.0**24
        )
        model = accumulating(dtype="mixed_float16")
        compiled(model, True, optimizer)
        batches = test_utils.microbatches([4] * WINDOW)
        for _ in range(16):
            test_utils.train_on(model, batches)
        self.assertGreater(iterations(model), 0)
        self.assertLess(float(optimizer.dynamic_scale), 2.0**24)
        self.assertTrue(all(np.isfinite(w).all() for w in model.get_weights()))


class DistributionTest(test_utils.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.strategy, reason = test_utils.chosen_strategy()
        if reason:
            self.skipTest(reason)
        if self.strategy.num_replicas_in_sync != 2:
            self.skipTest("For two replicas.")

    def fit(self, policy, batches, **kwargs):
        with self.strategy.scope():
            model = compiled(accumulating(policy, **kwargs), True)
        data = test_utils.dataset(batches, known_length=True)
        history = model.fit(data, epochs=1, verbose=0, shuffle=False)
        return model, history.history

    def test_one_of_two_is_bad(self):
        batches = test_utils.microbatches([8, 8, 8])
        # Replica 0 has the first half of each batch.
        bad = [batches[0], spoiled(batches[1]), batches[2]]
        model, history = self.fit("skip_microbatch", bad)
        rows = [0, 1, 2, 3, 4, 5, 6, 7]
        x, y = batches[1]
        rest = [batches[0], (x[rows[4:]], y[rows[4:]]), batches[2]]
        expected = compiled(test_utils.mlp())
        expected.run_eagerly = True
        initial = expected.get_weights()
        expected.train_on_batch(*test_utils.concatenate(rest))
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial
        )
        self.assertEqual(history["nonfinite_microbatches"], [1])
        self.assertTrue(np.isfinite(history["loss"][0]))

    @pytest.mark.thorough
    def test_no_update_for_any(self):
        batches = test_utils.microbatches([8] * 6)
        batches[1] = spoiled(batches[1])
        model, history = self.fit("skip_window", batches)
        self.assertEqual(iterations(model), 1)
        self.assertEqual(history["nonfinite_windows"], [1])
        self.assertTrue(np.isfinite(history["loss"][0]))

    @pytest.mark.thorough
    def test_none_counts(self):
        batches = [spoiled(b) for b in test_utils.microbatches([8] * WINDOW)]
        for x, _ in batches:
            x[:] = np.nan
        model, history = self.fit("skip_microbatch", batches)
        self.assertEqual(iterations(model), 0)
        self.assertEqual(history["nonfinite_microbatches"], [2 * WINDOW])


class LogsTest(test_utils.TestCase):
    def test_only_if_there_are_any(self):
        model = compiled(accumulating())
        batches = test_utils.microbatches([4] * WINDOW)
        finite = test_utils.dataset(batches)
        bad = test_utils.dataset([*batches[:2], spoiled(batches[2])])
        history = model.fit(finite, verbose=0).history
        self.assertNotIn("nonfinite_microbatches", history)
        history = model.fit(bad, epochs=2, verbose=0).history
        # Each epoch counts its own.
        self.assertEqual(history["nonfinite_microbatches"], [1, 1])
        self.assertTrue(np.isfinite(history["loss"]).all())
        self.assertLen(model.weights, 4)

    def test_a_failed_window_is_forgotten(self):
        model = compiled(accumulating())
        (batch,) = test_utils.microbatches([4])
        model.train_on_batch(*batch)
        model.reset_window()
        test_utils.train_on(model, [spoiled(batch)] * WINDOW)
        self.assertEqual(iterations(model), 0)


class PolicyTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters("skip", "", None, 1)
    def test_unknown(self, value):
        with self.assertRaisesRegex(ValueError, "`nonfinite` must be one of"):
            accumulating(value)
        with self.assertRaisesRegex(ValueError, "Received: nonfinite="):
            accumulating().nonfinite = value

    @pytest.mark.thorough
    def test_may_be_set_at_any_time(self):
        model = compiled(test_utils.accumulating(accum_steps=WINDOW))
        batches = test_utils.microbatches([4] * WINDOW)
        test_utils.train_on(model, batches)
        bad = [spoiled(batches[0]), *batches[1:]]
        for policy, updates in (("skip_microbatch", 2), ("skip_window", 2)):
            model.nonfinite = policy
            test_utils.train_on(model, bad)
            self.assertEqual(iterations(model), updates)
        model.nonfinite = "propagate"
        test_utils.train_on(model, batches)
        self.assertEqual(iterations(model), 3)
        test_utils.train_on(model, bad)
        self.assertTrue(np.isnan(model.get_weights()[0]).any())

    def test_is_saved(self):
        model = accumulating("skip_window")
        config = model.get_config()
        self.assertEqual(config["nonfinite"], "skip_window")
        again = type(model).from_config(config)
        self.assertEqual(again.nonfinite, "skip_window")


if __name__ == "__main__":
    tf.test.main()
