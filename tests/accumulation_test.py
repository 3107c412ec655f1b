"""What a model owns: its options may change, its window may end."""

import tensorflow as tf

import keras_accum
from tests import test_utils


class ChangeTest(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        self.model = test_utils.accumulating(accum_steps=3)
        self.model.compile("sgd", loss=test_utils.crossentropy())
        self.batch = test_utils.microbatches([4])[0]
        self.model.train_on_batch(*self.batch)
        self.accumulation = self.model._accumulation

    def test_an_error_changes_nothing(self):
        before, function = self.accumulation.options, self.model.train_function
        for name, value in (
            ("accum_steps", 0),
            ("microbatch_size", 4),
            ("partial_window", "keep"),
            ("nonfinite", "raise"),
        ):
            with self.assertRaises(ValueError):
                setattr(self.model, name, value)
        self.assertIs(self.accumulation.options, before)
        self.assertIs(self.model.train_function, function)
        self.assertEqual(test_utils.num_microbatches(self.model), 1)

    def test_makes_functions_anew_where_they_do_not_fit(self):
        function = self.model.train_function
        self.model.accum_steps = 5
        self.model.partial_window = "carry"
        self.assertIs(self.model.train_function, function)
        self.model.accum_steps = lambda updates: 2
        self.assertIsNot(self.model.train_function, function)

    def test_another_policy_starts_a_window(self):
        self.model.nonfinite = "propagate"
        self.assertEqual(test_utils.num_microbatches(self.model), 1)
        self.model.nonfinite = "skip_window"
        self.assertEqual(test_utils.num_microbatches(self.model), 0)
        self.assertEqual(test_utils.position(self.model), 0)

    def test_an_optimizer_that_accumulates_is_refused(self):
        model = test_utils.accumulating(accum_steps=1)
        optimizer = tf.keras.optimizers.SGD(gradient_accumulation_steps=2)
        model.compile(optimizer, loss=test_utils.crossentropy())
        with self.assertRaisesRegex(ValueError, "accumulate a second time"):
            model.accum_steps = 2
        self.assertEqual(model.accum_steps, 1)

    def test_another_optimizer_makes_the_next_flush(self):
        model = self.model
        model.flush()
        before = model.get_weights()
        model.compile(
            tf.keras.optimizers.SGD(0.0), loss=test_utils.crossentropy()
        )
        model.train_step(tuple(map(tf.constant, self.batch)))
        model.flush()
        self.assertEqual(int(model.optimizer.iterations), 1)
        self.assertAllClose(before, model.get_weights(), 0, 0)


class OverrideTest(test_utils.TestCase):
    def test_a_reset_of_ones_own_is_called(self):
        calls = []

        class Mine(keras_accum.GradientAccumulationModel):
            def reset_window(self):
                super().reset_window()
                calls.append(1)

        model = test_utils.mlp(Mine, accum_steps=2)
        x, y = test_utils.microbatches([2])[0]
        for change, expected in (
            (lambda: model.compile("sgd", test_utils.crossentropy()), 1),
            (lambda: setattr(model, "nonfinite", "skip_window"), 2),
            (lambda: model.fit(x, y, batch_size=1, verbose=0), 3),
        ):
            change()
            self.assertLen(calls, expected)


class OwnFunctionsTest(test_utils.TestCase):
    def test_where_keras_has_no_way(self):
        model = test_utils.accumulating(accum_steps=1)
        model.compile("sgd", loss=test_utils.crossentropy())
        self.assertFalse(model._accumulation.trains_itself())
        with test_utils.mirrored().scope():
            model = test_utils.accumulating(accum_steps=1)
            model.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=True
            )
        self.assertTrue(model._accumulation.trains_itself())
        self.assertTrue(model._accumulation.predicts_itself())
        # By hand it stays a `keras.Model`.
        self.assertFalse(model._accumulation.is_active)


if __name__ == "__main__":
    tf.test.main()
