"""Windows that the end of an epoch cuts short, and what is left over."""

import warnings

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils


def compiled(model, **kwargs):
    model.compile(
        keras.optimizers.Adam(0.01), loss=test_utils.crossentropy(), **kwargs
    )
    return model


def reference(epochs_of_windows):
    """Trains a plain model on these windows; returns its weights."""
    model = compiled(test_utils.mlp(), run_eagerly=True)
    for window in epochs_of_windows:
        model.train_on_batch(*test_utils.concatenate(window))
    return model


BATCHES = test_utils.microbatches([8, 7, 5, 3, 6, 2, 9])
FULL, REST = BATCHES[:4], BATCHES[4:]


class PolicyTest(test_utils.TestCase, parameterized.TestCase):
    def assertTrainedOn(self, model, windows):
        expected = reference(windows)
        self.assertEqual(int(model.optimizer.iterations), len(windows))
        self.assertSameWeights(
            model.get_weights(),
            expected.get_weights(),
            test_utils.mlp().get_weights(),
        )

    @parameterized.parameters(
        (1, False, False),
        (1, True, True),
        (3, False, True),
        (3, True, False),
        (50, False, False),
        (50, True, False),
    )
    @test_utils.first_command(4, second=(1,))
    def test_flush(self, steps_per_execution, jit_compile, known_length):
        model = compiled(
            test_utils.accumulating(),
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
        )
        model.fit(
            test_utils.dataset(BATCHES, known_length), epochs=2, verbose=0
        )
        self.assertTrainedOn(model, [FULL, REST] * 2)

    def test_flush_eagerly(self):
        model = compiled(test_utils.accumulating(), run_eagerly=True)
        model.fit(test_utils.dataset(BATCHES), epochs=2, verbose=0)
        self.assertTrainedOn(model, [FULL, REST] * 2)

    def test_carry(self):
        model = compiled(test_utils.accumulating(partial_window="carry"))
        data = test_utils.dataset(BATCHES)
        model.fit(data, epochs=1, verbose=0)
        self.assertTrainedOn(model, [FULL])
        # The next `fit` goes on, over three epochs and a half window.
        model.fit(data, epochs=2, verbose=0)
        everything = BATCHES * 3
        windows = [everything[i : i + 4] for i in range(0, 20, 4)]
        self.assertTrainedOn(model, windows)
        model.flush()
        self.assertTrainedOn(model, [*windows, everything[20:]])

    @parameterized.parameters("carry", "drop")
    def test_a_fit_without_update_leaves_averaged_weights(self, policy):
        model = test_utils.accumulating(partial_window=policy)
        initial = model.get_weights()
        model.compile(
            keras.optimizers.SGD(0.1, use_ema=True),
            loss=test_utils.crossentropy(),
            jit_compile=False,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "An epoch has fewer")
            model.fit(test_utils.dataset(BATCHES[:3]), verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 0)
        self.assertAllClose(model.get_weights(), initial, 0, 0)
        model.fit(test_utils.dataset(FULL), verbose=0)
        averages = model.optimizer._model_variables_moving_average
        self.assertAllClose(model.trainable_weights, averages, 0, 0)
        self.assertGreater(np.abs(model.get_weights()[0] - initial[0]).max(), 0)

    def test_drop(self):
        model = compiled(test_utils.accumulating(partial_window="drop"))
        model.fit(test_utils.dataset(BATCHES), epochs=2, verbose=0)
        self.assertTrainedOn(model, [FULL] * 2)
        self.assertEqual(test_utils.num_microbatches(model), 0)

    def test_stopped_epoch_is_flushed(self):
        model = compiled(test_utils.accumulating())

        class Stop(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                self.model.stop_training = batch == 5

        model.fit(
            test_utils.dataset(BATCHES), epochs=9, verbose=0, callbacks=[Stop()]
        )
        self.assertTrainedOn(model, [FULL, BATCHES[4:6]])

    def test_policy_may_change(self):
        model = compiled(test_utils.accumulating(partial_window="drop"))
        model.partial_window = "flush"
        model.fit(test_utils.dataset(BATCHES), verbose=0)
        self.assertTrainedOn(model, [FULL, REST])
        with self.assertRaisesRegex(ValueError, "`partial_window` must be one"):
            model.partial_window = "keep"

    def test_fit_that_is_overridden_behind_the_mixin(self):
        class Theirs(keras.Model):
            def fit(self, x, *others, **more):
                return super().fit(x, *others, **more)

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            pass

        model = compiled(test_utils.mlp(Mine, accum_steps=4))
        model.fit(test_utils.dataset(BATCHES), epochs=2, verbose=0)
        self.assertTrainedOn(model, [FULL, REST] * 2)

    def test_flush_and_reset_by_hand(self):
        model = compiled(test_utils.accumulating())
        model.flush()
        self.assertEqual(int(model.optimizer.iterations), 0)
        test_utils.train_on(model, BATCHES[:3])
        model.reset_window()
        test_utils.train_on(model, BATCHES[3:5])
        model.flush()
        model.flush()
        self.assertTrainedOn(model, [BATCHES[3:5]])


class OrderTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 3)
    @test_utils.first_command(0)
    def test_validation_and_callbacks_see_the_flushed_model(self, steps):
        expected = reference([FULL, REST])
        model = compiled(test_utils.accumulating(), steps_per_execution=steps)
        seen = {}

        class See(keras.callbacks.Callback):
            def on_test_begin(self, logs=None):
                seen["test"] = self.model.get_weights()

            def on_epoch_end(self, epoch, logs=None):
                seen["epoch"] = self.model.get_weights()
                seen["val_loss"] = logs["val_loss"]

        model.fit(
            test_utils.dataset(BATCHES),
            verbose=0,
            validation_data=BATCHES[0],
            callbacks=[See()],
        )
        for when in ("test", "epoch"):
            self.assertSameWeights(
                seen[when],
                expected.get_weights(),
                test_utils.mlp().get_weights(),
            )
        loss = expected.evaluate(*BATCHES[0], verbose=0)
        self.assertAllClose(seen["val_loss"], loss, rtol=1e-5)

    def test_evaluation_in_mid_epoch_does_not_flush(self):
        model = compiled(test_utils.accumulating())

        class Evaluate(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 1:
                    self.model.evaluate(*BATCHES[0], verbose=0)

        model.fit(test_utils.dataset(FULL), verbose=0, callbacks=[Evaluate()])
        self.assertEqual(int(model.optimizer.iterations), 1)


class LeftoverTest(test_utils.TestCase, parameterized.TestCase):
    def interrupt(self, model, error):
        class Interrupt(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 1:
                    raise error

        with self.assertRaises(type(error)):
            model.fit(
                test_utils.dataset(BATCHES), verbose=0, callbacks=[Interrupt()]
            )

    @parameterized.parameters("flush", "drop")
    @test_utils.first_command(0)
    def test_interrupted_fit_leaves_nothing(self, policy):
        for error in (KeyboardInterrupt(), ValueError("mine")):
            model = compiled(test_utils.accumulating(partial_window=policy))
            self.interrupt(model, error)
            self.assertEqual(test_utils.position(model), 0)
            self.assertEqual(test_utils.num_microbatches(model), 0)
            model.fit(test_utils.dataset(FULL), verbose=0)
            self.assertSameWeights(
                model.get_weights(),
                reference([FULL]).get_weights(),
                test_utils.mlp().get_weights(),
            )

    def test_interrupted_fit_carries_on_if_asked(self):
        model = compiled(test_utils.accumulating(partial_window="carry"))
        self.interrupt(model, KeyboardInterrupt())
        model.fit(test_utils.dataset(BATCHES[2:4]), verbose=0)
        self.assertSameWeights(
            model.get_weights(),
            reference([FULL]).get_weights(),
            test_utils.mlp().get_weights(),
        )

    def test_generator_that_fails(self):
        model = compiled(test_utils.accumulating())

        def failing():
            yield BATCHES[0]
            yield BATCHES[1]
            raise OSError("gone")

        with self.assertRaisesRegex(Exception, "gone"):
            model.fit(failing(), verbose=0)
        self.assertEqual(test_utils.position(model), 0)

    def test_train_on_batch_leaves_nothing_for_fit(self):
        model = compiled(test_utils.accumulating())
        test_utils.train_on(model, REST)
        model.fit(test_utils.dataset(FULL), verbose=0)
        self.assertSameWeights(
            model.get_weights(),
            reference([FULL]).get_weights(),
            test_utils.mlp().get_weights(),
        )

    def test_carry_goes_on_with_steps_by_hand(self):
        model = compiled(test_utils.accumulating(partial_window="carry"))
        model.train_step(FULL[0])
        model.fit(test_utils.dataset(FULL[1:]), verbose=0)
        self.assertSameWeights(
            model.get_weights(),
            reference([FULL]).get_weights(),
            test_utils.mlp().get_weights(),
        )

    @parameterized.parameters("flush", "carry")
    @test_utils.first_command(1)
    def test_recompiling_starts_afresh(self, policy):
        model = compiled(test_utils.accumulating(partial_window=policy))
        test_utils.train_on(model, REST)
        compiled(model)
        test_utils.train_on(model, FULL)
        self.assertSameWeights(
            model.get_weights(),
            reference([FULL]).get_weights(),
            test_utils.mlp().get_weights(),
        )


class ShortEpochTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(("flush", 3), ("drop", 0), ("carry", 1))
    def test_trains_and_warns_once(self, policy, updates):
        model = compiled(
            test_utils.accumulating(accum_steps=16, partial_window=policy)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(
                test_utils.dataset(BATCHES, known_length=True),
                epochs=3,
                verbose=0,
            )
        messages = [str(w.message) for w in caught]
        about = [m for m in messages if "fewer micro-batches than" in m]
        self.assertEqual(int(model.optimizer.iterations), updates)
        if policy == "carry":
            self.assertEmpty(about)
        else:
            self.assertLen(about, 1)
            self.assertIn("7, with accum_steps=16", about[0])

    def test_a_full_epoch_does_not_warn(self):
        model = compiled(test_utils.accumulating(accum_steps=4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x, y = test_utils.concatenate(BATCHES)
            model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 4)


class LogsTest(test_utils.TestCase):
    def test_loss_within_a_window_is_that_of_its_micro_batches(self):
        model = compiled(test_utils.accumulating())
        plain = compiled(test_utils.mlp(), run_eagerly=True)
        losses = []
        model.fit(
            test_utils.dataset(FULL),
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: losses.append(
                        logs["loss"]
                    )
                )
            ],
        )
        for index, loss in enumerate(losses):
            so_far = test_utils.concatenate(FULL[: index + 1])
            expected = plain.evaluate(*so_far, batch_size=99, verbose=0)
            self.assertAllClose(loss, expected, rtol=1e-5)
        self.assertLen(losses, 4)
        self.assertFalse(np.isnan(losses).any())


if __name__ == "__main__":
    tf.test.main()
