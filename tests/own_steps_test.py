"""A `train_step` of one's own: calls of `accumulate`, and whose they are."""

import pathlib
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import auto_size
from keras_accum import objectives
from keras_accum import reduction
from tests import own_steps_cases as cases
from tests import test_utils

# Of uneven sizes, and the last window is short.
SIZES = [[4, 3, 5], [2, 4, 4], [5, 2]]
FLAT = [size for window in SIZES for size in window]


def scaled(optimizer):
    """Doubles its scale at every update, so that none may be a constant."""
    return keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale=8.0, dynamic_growth_steps=1
    )


def gan(wrap=lambda optimizer: optimizer, strategy=None, mode=None, **kwargs):
    """A compiled GAN."""
    with (strategy or tf.distribute.get_strategy()).scope():
        model = cases.GAN(**({"accum_steps": 3} | kwargs))
        mode = mode or {"jit_compile": False}
        model.compile(**cases.gan_optimizers(wrap), **mode)
    return model


class GANTest(test_utils.TestCase, parameterized.TestCase):
    def assertSameGAN(self, model, wrap=lambda optimizer: optimizer):
        expected, initial = cases.trained_at_once(SIZES, wrap)
        # Adam divides by the size of a gradient, and amplifies its rounding.
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial, 1e-4
        )
        for name in ("d_optimizer", "g_optimizer"):
            mine, theirs = getattr(model, name), getattr(expected, name)
            self.assertEqual(test_utils.num_updates(mine), len(SIZES))
            for some, other in zip(
                mine.variables, theirs.variables, strict=True
            ):
                self.assertEqual(some.shape, other.shape)
                self.assertAllClose(some, other, 1e-3, 1e-5)

    @parameterized.parameters(
        ({"jit_compile": True},),
        ({"jit_compile": False},),
        ({"run_eagerly": True},),
        ({"jit_compile": True, "steps_per_execution": 3},),
    )
    @test_utils.first_command(2, second=(3,))
    def test_two_optimizers(self, mode):
        model = gan(mode=mode)
        batches = cases.gan_batches(FLAT)
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameGAN(model)
        # Nothing was given to the model's own.
        self.assertFalse(model.optimizer.built)

    @parameterized.parameters(
        (True, {}),
        (False, {}),
        (True, {"nonfinite": "skip_microbatch"}),
        (False, {"nonfinite": "skip_window"}),
    )
    @test_utils.first_command(second=(0,))
    def test_on_replicas(self, jit_compile, kwargs):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        mode = {"jit_compile": jit_compile}
        model = gan(strategy=strategy, mode=mode, **kwargs)
        batches = cases.gan_batches(FLAT)
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameGAN(model)

    @pytest.mark.thorough
    def test_one_reduction_for_all(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)

        def reductions(model, batches):
            with mock.patch.object(
                reduction, "reduce_across", wraps=reduction.reduce_across
            ) as reduce:
                model.fit(test_utils.dataset(batches), verbose=0)
            return reduce.call_count

        with strategy.scope():
            other = test_utils.accumulating(accum_steps=2)
            other.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
        expected = reductions(other, test_utils.microbatches([4] * 2))
        model = gan(strategy=strategy, accum_steps=2)
        found = reductions(model, cases.gan_batches([4] * 2))
        self.assertEqual(found, expected)

    def test_all_updates_are_rehearsed(self):
        model = gan(mode={"jit_compile": False})
        model.train_on_batch(*cases.gan_batches([4])[0])
        before = model.get_weights()
        applied = []

        def apply(update):
            applied.append(update.optimizer)
            update.optimizer.apply(update.gradients, update.variables)

        with mock.patch.object(objectives.Update, "apply", apply):
            auto_size.make_rehearsal(model._accumulation)()
        self.assertEqual(
            set(map(id, applied)),
            {id(model.d_optimizer), id(model.g_optimizer)},
        )
        self.assertAllClose(before, model.get_weights(), 0, 0)

    @parameterized.parameters(
        ({"jit_compile": True}, None),
        ({"jit_compile": False, "steps_per_execution": 3}, None),
        ({"run_eagerly": True}, None),
        ({"jit_compile": False}, "mirrored"),
    )
    @test_utils.first_command(2, second=(3,))
    def test_each_scales_its_own_loss(self, mode, strategy):
        if strategy is not None:
            strategy, missing = test_utils.chosen_strategy()
            if missing:
                self.skipTest(missing)
        model = gan(scaled, strategy, mode)
        batches = cases.gan_batches(FLAT)
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameGAN(model, scaled)

    @parameterized.product(size=(3, "auto"), jit_compile=(True, False))
    @test_utils.first_command(1, second=(2,))
    def test_micro_batches_of_a_batch(self, size, jit_compile):
        model = gan(
            accum_steps=1,
            microbatch_size=size,
            mode={"jit_compile": jit_compile},
        )
        batches = cases.gan_batches(FLAT)
        windows = []
        for window in SIZES:
            windows.append(test_utils.concatenate(batches[: len(window)]))
            batches = batches[len(window) :]
        model.fit(test_utils.dataset(windows), verbose=0)
        self.assertSameGAN(model)

    def test_one_micro_batch_is_applied_at_once(self):
        model = gan(accum_steps=1, mode={"run_eagerly": True})
        expected = cases.InTurn()
        expected.compile(**cases.gan_optimizers(), run_eagerly=True)
        for batch in cases.gan_batches([4, 4]):
            for each in (model, expected):
                each.train_step(batch)
        self.assertAllClose(
            model.get_weights(), expected.get_weights(), 1e-6, 1e-6
        )
        self.assertIsNone(test_utils.accumulator(model))

    def test_schedule_counts_the_updates_of_the_step(self):
        model = gan(accum_steps=lambda updates: 1 + updates)
        batches = cases.gan_batches([4] * 6)
        model.fit(test_utils.dataset(batches), verbose=0)
        # Windows of 1, 2 and 3.
        self.assertEqual(int(model.d_optimizer.iterations), 3)
        self.assertEqual(test_utils.position(model), 0)

    def test_an_optimizer_that_accumulates_itself_is_refused(self):
        model = cases.GAN(accum_steps=2)
        optimizers = cases.gan_optimizers()
        optimizers["g_optimizer"] = keras.optimizers.SGD(
            gradient_accumulation_steps=2
        )
        model.compile(**optimizers)
        with self.assertRaisesRegex(ValueError, "accumulate a second time"):
            model.fit(test_utils.dataset(cases.gan_batches([4])), verbose=0)


class ResumeTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters("checkpoint", "window.weights.h5")
    @test_utils.first_command(0)
    def test_goes_on_in_mid_window(self, name):
        def train(model, batches):
            model.fit(test_utils.dataset(batches), verbose=0)

        batches = cases.gan_batches([4] * 6)
        whole, half, resumed = (
            gan(partial_window="carry", mode={"jit_compile": False})
            for _ in range(3)
        )
        train(whole, batches)
        train(half, batches[:4])
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / name)
            if name == "checkpoint":
                tf.train.Checkpoint(model=half).write(path)
                tf.train.Checkpoint(model=resumed).read(path)
            else:
                # Keras cannot tell, without a `call`.
                half.built = resumed.built = True
                half.save_weights(path)
                for model in (half, resumed):
                    for optimizer, network in (
                        (model.d_optimizer, model.discriminator),
                        (model.g_optimizer, model.generator),
                    ):
                        if not optimizer.built:
                            optimizer.build(network.trainable_weights)
                resumed.load_weights(path)
            self.assertEqual(test_utils.position(resumed), 1)
            resumed.built = True
            again = str(pathlib.Path(folder) / "again.weights.h5")
            # What no step has shown yet is saved again.
            resumed.save_weights(again)
            resumed.load_weights(again)
            with self.assertRaisesRegex(ValueError, "2 more losses"):
                resumed.flush()
            # A checkpoint waits for variables that are not there yet.
            train(resumed, batches[4:])
        for mine, theirs in zip(
            resumed.get_weights(), whole.get_weights(), strict=True
        ):
            self.assertAllClose(mine, theirs, 1e-5, 1e-6)
        self.assertEqual(int(resumed.g_optimizer.iterations), 2)

    @parameterized.product(before=(1, 2), after=(1, 2))
    @test_utils.first_command(second=(1,))
    def test_goes_on_on_another_number_of_replicas(self, before, after):
        def make(replicas):
            strategy = None
            if replicas > 1:
                strategy, missing = test_utils.chosen_strategy()
                if missing:
                    self.skipTest(missing)
            return gan(strategy=strategy, partial_window="carry")

        batches = cases.gan_batches([4] * 6)
        half, resumed = make(before), make(after)
        half.fit(test_utils.dataset(batches[:4]), verbose=0)
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / "checkpoint")
            tf.train.Checkpoint(model=half).write(path)
            tf.train.Checkpoint(model=resumed).read(path).expect_partial()
            resumed.fit(test_utils.dataset(batches[4:]), verbose=0)
        expected, initial = cases.trained_at_once([[4] * 3] * 2)
        self.assertSameWeights(
            resumed.get_weights(), expected.get_weights(), initial, 1e-4
        )

    def test_goes_on_where_steps_were_made(self):
        model = gan(partial_window="carry", mode={"jit_compile": False})
        batches = cases.gan_batches([4] * 4)
        model.fit(test_utils.dataset(batches), verbose=0)
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / "checkpoint")
            tf.train.Checkpoint(model=model).write(path)
            model.fit(test_utils.dataset(batches[:2]), verbose=0)
            after = model.get_weights()
            tf.train.Checkpoint(model=model).read(path)
        model.fit(test_utils.dataset(batches[:2]), verbose=0)
        self.assertAllClose(after, model.get_weights(), 0, 0)


class NonfiniteTest(test_utils.TestCase, parameterized.TestCase):
    """A NaN in the noise is in the gradients of both networks; the real rows'
    is in the discriminator's alone."""

    def batches(self, spoils):
        batches = cases.gan_batches(FLAT)
        real, noise = (part.copy() for part in batches[1])
        (real if spoils == "real" else noise)[0, 0] = np.nan
        batches[1] = real, noise
        return batches

    @parameterized.product(spoils=("real", "noise"), jit_compile=(True, False))
    @test_utils.first_command(second=(3,))
    def test_a_micro_batch_is_skipped_as_a_whole(self, spoils, jit_compile):
        model = gan(
            nonfinite="skip_microbatch", mode={"jit_compile": jit_compile}
        )
        model.fit(test_utils.dataset(self.batches(spoils)), verbose=0)
        self.assertEqual(model.nonfinite_microbatches, 1)
        expected, initial = cases.trained_on(
            [
                test_utils.concatenate(part)
                for part in (
                    [cases.gan_batches(FLAT)[0], cases.gan_batches(FLAT)[2]],
                    cases.gan_batches(FLAT)[3:6],
                    cases.gan_batches(FLAT)[6:],
                )
            ]
        )
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial, 1e-4
        )

    @parameterized.product(
        wrap=(lambda optimizer: optimizer, scaled), jit_compile=(True, False)
    )
    @test_utils.first_command(3, second=(0,))
    def test_a_window_is_skipped_as_a_whole(self, wrap, jit_compile):
        model = gan(
            wrap, nonfinite="skip_window", mode={"jit_compile": jit_compile}
        )
        model.fit(test_utils.dataset(self.batches("real")[:3]), verbose=0)
        before = gan(wrap).get_weights()
        self.assertEqual(model.nonfinite_windows, 1)
        self.assertAllClose(before, model.get_weights(), 0, 0)
        self.assertEqual(test_utils.num_updates(model.g_optimizer), 0)
        if wrap is scaled:
            # The generator's gradients were finite, and its scale stays.
            self.assertAllEqual(model.d_optimizer.dynamic_scale, 4.0)
            self.assertAllEqual(model.g_optimizer.dynamic_scale, 8.0)
        model.fit(test_utils.dataset(cases.gan_batches([4] * 3)), verbose=0)
        self.assertEqual(test_utils.num_updates(model.g_optimizer), 1)


class LeftOutTest(test_utils.TestCase):
    def test_a_network_that_is_not_trained_now(self):
        class Sometimes(cases.GAN):
            trains_generator = False

            def update_by(self, optimizer, *args):
                if optimizer is self.d_optimizer or self.trains_generator:
                    super().update_by(optimizer, *args)

        model = Sometimes(accum_steps=2)
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.optimizers.Adam(0.01, weight_decay=0.1),
            run_eagerly=True,
        )
        batches = cases.gan_batches([4] * 2)
        model.trains_generator = True
        model.fit(test_utils.dataset(batches), verbose=0)
        before = model.generator.get_weights()
        model.trains_generator = False
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertAllClose(before, model.generator.get_weights(), 0, 0)
        self.assertEqual(test_utils.num_updates(model.g_optimizer), 1)
        self.assertEqual(int(model.d_optimizer.iterations), 2)
        # In a part of the window alone: what is left of the last is forgotten.
        alone = Sometimes(accum_steps=1)
        alone.set_weights(model.get_weights())
        model.compile(
            keras.optimizers.SGD(0.1),
            keras.optimizers.SGD(0.1),
            run_eagerly=True,
        )
        model.trains_generator = True
        model.fit(test_utils.dataset(batches), verbose=0)
        alone.set_weights(model.get_weights())
        model.trains_generator = False
        model.train_on_batch(*batches[0])
        model.trains_generator = True
        model.train_on_batch(*batches[1])
        alone.compile(
            keras.optimizers.SGD(0.1),
            keras.optimizers.SGD(0.1),
            run_eagerly=True,
        )
        alone.trains_generator = True
        generator_before = alone.generator.get_weights()
        with tf.GradientTape() as tape:
            logits = alone.discriminator(alone.generator(batches[1][1]))
            loss = alone.loss_fn(tf.zeros_like(logits), logits)
        gradients = tape.gradient(loss, alone.generator.trainable_weights)
        for mine, start, gradient in zip(
            model.generator.get_weights(),
            generator_before,
            gradients,
            strict=True,
        ):
            self.assertAllClose(mine, start - 0.1 * gradient, 1e-5, 1e-6)


class SeveralCallsTest(test_utils.TestCase, parameterized.TestCase):
    """Calls for the same weights, compared with the large batch's losses."""

    def losses(self, model, x, y):
        logits = model(x, training=True)
        first = tf.reduce_mean(tf.square(logits[:, 0]))
        mask = tf.cast(y > 0, tf.float32)
        total = tf.reduce_sum(mask * tf.square(logits[:, 1]))
        return first, total, tf.reduce_sum(mask)

    def check(self, cls, **mode):
        batches = test_utils.microbatches([4, 3, 5, 2, 6, 1])
        model = test_utils.mlp(cls, accum_steps=3)
        model.compile(keras.optimizers.Adam(0.01), **mode)
        expected = test_utils.mlp()
        expected.compile(keras.optimizers.Adam(0.01), jit_compile=False)
        initial = expected.get_weights()
        model.fit(test_utils.dataset(batches), verbose=0)
        for window in (batches[:3], batches[3:]):
            with tf.GradientTape() as tape:
                first, total, count = self.losses(
                    expected, *map(tf.constant, test_utils.concatenate(window))
                )
                loss = first + total / count
            expected.optimizer.apply(
                tape.gradient(loss, expected.trainable_weights),
                expected.trainable_weights,
            )
        self.assertSameTraining(model, expected, initial, 1e-4)
        self.assertEqual(int(model.optimizer.iterations), 2)

    @parameterized.parameters(
        {"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}
    )
    @test_utils.first_command(2, second=(0,))
    def test_two_losses_of_the_same_weights(self, **mode):
        losses = self.losses

        class Two(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                with tf.GradientTape(persistent=True) as tape:
                    first, total, count = losses(self, x, y)
                    second = tf.math.divide_no_nan(total, count)
                weights = self.trainable_weights
                self.accumulate(tape.gradient(first, weights), tf.shape(x)[0])
                gradients = tape.gradient(second, weights)
                pairs = list(zip(gradients, weights, strict=True))
                self.accumulate(pairs[::-1], count)
                return {"loss": first}

        self.check(Two, **mode)

    @pytest.mark.thorough
    def test_parts_of_one_loss_in_a_loop(self):
        class Parts(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                rows = tf.shape(x)[0]
                half = rows // 2
                for part in (slice(0, half), slice(half, rows)):
                    with tf.GradientTape() as tape:
                        loss = self.compute_loss(
                            y=y[part], y_pred=self(x[part])
                        )
                    count = part.stop - part.start
                    gradients = tape.gradient(loss, self.trainable_weights)
                    self.accumulate(gradients, count)
                return {"loss": loss}

        batches = test_utils.microbatches([4, 3, 5, 2, 6, 2])
        model = test_utils.mlp(Parts, accum_steps=3)
        expected = test_utils.mlp()
        for each in (model, expected):
            each.compile(
                "adam", loss=test_utils.crossentropy(), jit_compile=False
            )
        initial = expected.get_weights()
        model.fit(test_utils.dataset(batches), verbose=0)
        for window in (batches[:3], batches[3:]):
            test_utils.train_on(expected, [test_utils.concatenate(window)])
        self.assertSameTraining(model, expected, initial, 1e-4)

    def test_micro_batches_are_counted_once(self):
        model = gan(accum_steps=8, mode={"run_eagerly": True})
        model.train_on_batch(*cases.gan_batches([4])[0])
        self.assertEqual(test_utils.num_microbatches(model), 1)
        self.assertEqual(test_utils.position(model), 1)

    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_no_more_are_counted_than_there_are(self, is_replicated):
        strategy = None
        if is_replicated:
            strategy, missing = test_utils.chosen_strategy()
            if missing:
                self.skipTest(missing)
        model = gan(strategy=strategy, partial_window="carry")
        # The iterator is asked once more than there are batches.
        batches = cases.gan_batches([4] * 4)
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertEqual(test_utils.position(model), 1)
        self.assertEqual(test_utils.num_microbatches(model), 1)

    def test_a_step_that_fails_has_added_nothing(self):
        class Fails(cases.GAN):
            fails = False

            def train_step(self, data):
                logs = super().train_step(data)
                if self.fails:
                    raise ArithmeticError
                return logs

        model = Fails(accum_steps=3)
        model.compile(**cases.gan_optimizers(), run_eagerly=True)
        batches = cases.gan_batches(FLAT)
        for index, batch in enumerate(batches):
            model.fails = index == 1
            if model.fails:
                with self.assertRaises(ArithmeticError):
                    model.train_on_batch(*batch)
                model.fails = False
            model.train_on_batch(*batch)
        model.flush()
        expected, initial = cases.trained_at_once(SIZES)
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial, 1e-4
        )

    def test_steps_by_hand(self):
        model = gan(mode={"run_eagerly": True})
        parts = iter(cases.gan_batches(FLAT))
        for window in SIZES:
            for _ in window:
                model.train_step(next(parts))
            model.update_step()
        expected, initial = cases.trained_at_once(SIZES)
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial, 1e-4
        )

    @pytest.mark.thorough
    def test_window_is_forgotten(self):
        model = gan(mode={"jit_compile": False})
        batches = cases.gan_batches(FLAT)
        model.train_on_batch(*cases.gan_batches([7], seed=5)[0])
        model.reset_window()
        for batch in batches:
            model.train_on_batch(*batch)
        model.flush()
        expected, initial = cases.trained_at_once(SIZES)
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial, 1e-4
        )


class TracedByTheUserTest(test_utils.TestCase, parameterized.TestCase):
    """TensorFlow decides how often code of its functions and loops runs."""

    @parameterized.product(
        kind=("function", "loop"),
        mode=({"jit_compile": False}, {"run_eagerly": True}),
    )
    def test_a_call_that_is_not_in_the_step_itself(self, kind, mode):
        class Traced(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                def body(index):
                    zeros = [tf.zeros(v.shape) for v in self.trainable_weights]
                    self.accumulate(zeros, 1.0)
                    return index + 1

                def loop():
                    tf.while_loop(lambda index: index < 2, body, [0])

                called = body if kind == "function" else loop
                args = (tf.constant(0),) if kind == "function" else ()
                tf.function(called, autograph=False)(*args)
                return {}

        model = test_utils.mlp(Traced, accum_steps=2)
        model.compile("sgd", **mode)
        with self.assertRaisesRegex(RuntimeError, "by `train_step` itself"):
            model.train_on_batch(*test_utils.microbatches([4])[0])


class RefusedTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        mode=({"run_eagerly": True}, {"jit_compile": True}),
        call=("apply", "apply_gradients"),
    )
    @test_utils.first_command(0, second=(3,))
    def test_a_gan_that_updates_by_itself(self, mode, call):
        class Unedited(cases.GAN):
            def update_by(self, optimizer, gradients, variables, rows):
                if call == "apply":
                    optimizer.apply(gradients, variables)
                else:
                    optimizer.apply_gradients(
                        zip(gradients, variables, strict=True)
                    )

        model = Unedited(accum_steps=2)
        model.compile(**cases.gan_optimizers(), **mode)
        before = model.get_weights()
        dataset = test_utils.dataset(cases.gan_batches([4, 4]))
        with self.assertRaisesRegex(
            RuntimeError, r"optimizer=self.my_optimizer.*own_steps_test.py:\d+"
        ):
            model.fit(dataset, verbose=0)
        self.assertAllClose(before, model.get_weights(), 0, 0)
        self.assertFalse(model.g_optimizer.built)
        # It is a plain model, and may.
        model = Unedited(accum_steps=1)
        model.compile(**cases.gan_optimizers(), **mode)
        model.fit(dataset, verbose=0)
        self.assertNotAllClose(before[0], model.get_weights()[0])

    def test_a_model_that_a_callback_trains(self):
        other = test_utils.mlp()
        other.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)

        class TrainsOther(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                other.train_on_batch(*test_utils.microbatches([4])[0])

        model = gan()
        batches = cases.gan_batches([4] * 3)
        model.fit(
            test_utils.dataset(batches), verbose=0, callbacks=[TrainsOther()]
        )
        self.assertEqual(int(other.optimizer.iterations), 3)

    def test_a_loss_with_several_values_is_noticed(self):
        class Vector(keras_accum.GradientAccumulationModel):
            weight = 4

            def train_step(self, data):
                x, *_ = data
                with tf.GradientTape() as tape:
                    losses = tf.reduce_sum(self(x) ** 2, axis=-1)
                gradients = tape.gradient(losses, self.trainable_weights)
                self.accumulate(gradients, self.weight)
                return {}

        batch = test_utils.microbatches([4])[0]
        for weight in (4, None):
            model = test_utils.mlp(Vector, accum_steps=2)
            model.weight = weight
            model.compile("sgd", jit_compile=False)
            if weight:
                with self.assertWarnsRegex(UserWarning, "several values"):
                    model.train_on_batch(*batch)
            else:
                # The tests make errors of warnings.
                model.train_on_batch(*batch)


class LinesTest(test_utils.TestCase, parameterized.TestCase):
    """Calls from different lines: what their weights say they are."""

    def model(self, of_halves):
        def loss_of(model, x, y):
            return tf.reduce_mean(tf.square(model(x) - y))

        class Mine(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                weights, half = self.trainable_weights, tf.shape(x)[0] // 3
                one, other = (x[:half], y[:half]), (x[half:], y[half:])
                if not of_halves:
                    one, other = (x, y), (x, 2.0 * y)
                with tf.GradientTape(persistent=True) as tape:
                    losses = loss_of(self, *one), loss_of(self, *other)
                rows = tf.shape(one[0])[0]
                self.accumulate(tape.gradient(losses[0], weights), rows)
                rows = tf.shape(other[0])[0]
                self.accumulate(tape.gradient(losses[1], weights), rows)
                return {}

        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        model = Mine(inputs, keras.layers.Dense(1)(inputs), accum_steps=3)
        model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
        return model

    @parameterized.product(of_halves=(True, False), jit_compile=(True, False))
    @test_utils.first_command(1, second=(0,))
    def test_parts_and_losses(self, of_halves, jit_compile):
        model = self.model(of_halves)
        initial = model.get_weights()
        model.jit_compile = jit_compile
        rng = np.random.default_rng(0)
        batches = [
            (
                rng.normal(size=(rows, 3)).astype("float32"),
                rng.normal(size=(rows, 1)).astype("float32"),
            )
            for rows in (4, 7, 5)
        ]
        model.fit(test_utils.dataset(batches), verbose=0)
        x, y = map(tf.constant, test_utils.concatenate(batches))
        kernel, bias = (tf.Variable(each) for each in initial)
        with tf.GradientTape() as tape:
            outputs = tf.matmul(x, kernel) + bias
            loss = tf.reduce_mean(tf.square(outputs - y))
            if not of_halves:
                loss += tf.reduce_mean(tf.square(outputs - 2.0 * y))
        gradients = tape.gradient(loss, [kernel, bias])
        for actual, before, gradient in zip(
            model.get_weights(), initial, gradients, strict=True
        ):
            self.assertAllClose(actual, before - 0.1 * gradient)


if __name__ == "__main__":
    tf.test.main()
