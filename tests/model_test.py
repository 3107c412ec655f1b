"""What the model refuses, and what it says."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils


class ErrorTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(0, -1, 2.5, True, "8")
    def test_accum_steps(self, value):
        message = f"`accum_steps` must be .* Received: accum_steps={value!r}"
        with self.assertRaisesRegex((TypeError, ValueError), message):
            test_utils.accumulating(accum_steps=value)
        model = test_utils.accumulating(accum_steps=3)
        with self.assertRaisesRegex((TypeError, ValueError), message):
            model.accum_steps = value
        self.assertEqual(model.accum_steps, 3)

    def test_partial_window(self):
        with self.assertRaisesRegex(
            ValueError, "`partial_window` must be one of .*partial_window='no'"
        ):
            test_utils.accumulating(partial_window="no")

    @parameterized.parameters("int32", "flaot32", 7)
    def test_accumulator_dtype(self, value):
        with self.assertRaisesRegex(
            ValueError, "`accumulator_dtype` must be None or the name"
        ):
            test_utils.accumulating(accumulator_dtype=value)

    @parameterized.parameters("float16", "float32", 2)
    def test_communication_dtype(self, value):
        message = "`communication_dtype` must be None or .*Received: comm"
        with self.assertRaisesRegex(ValueError, message):
            test_utils.accumulating(communication_dtype=value)
        model = test_utils.accumulating(communication_dtype="bfloat16")
        with self.assertRaisesRegex(ValueError, message):
            model.communication_dtype = value
        self.assertEqual(model.communication_dtype, "bfloat16")

    def test_optimizer_that_accumulates(self):
        message = "`gradient_accumulation_steps` set.*=4"
        adam = keras.optimizers.Adam(gradient_accumulation_steps=4)
        optimizers = [adam, keras.optimizers.LossScaleOptimizer(adam)]
        if hasattr(keras.optimizers, "MultiOptimizer"):
            multi = keras.optimizers.OptimizerMap(adam)
            optimizers.append(keras.optimizers.MultiOptimizer(multi))
        for optimizer in optimizers:
            model = test_utils.accumulating()
            with self.assertRaisesRegex(ValueError, message):
                model.compile(optimizer, loss="mse")
        one = test_utils.accumulating(accum_steps=1)
        one.compile(adam, loss="mse")
        with self.assertRaisesRegex(ValueError, message):
            one.accum_steps = 2

    @parameterized.parameters(1, 2)
    def test_fit_that_takes_no_callbacks(self, accum_steps):
        class Mine(keras.Model):
            def fit(self, x):
                return super().fit(x)

        class Both(keras_accum.GradientAccumulationMixin, Mine):
            pass

        model = test_utils.mlp(Both, accum_steps=accum_steps)
        model.compile("sgd", loss="mse")
        with self.assertRaisesRegex(TypeError, "must take `callbacks`"):
            model.fit(tf.data.Dataset.range(3))

    @parameterized.parameters(1, 2)
    def test_number_of_gradients(self, accum_steps):
        model = test_utils.accumulating(accum_steps=accum_steps)
        model.compile("sgd", loss="mse")
        with self.assertRaisesRegex(
            ValueError, "`gradients` must have one entry .* 1 gradients for 4"
        ):
            model.accumulate([tf.constant(1.0)], 1.0)

    def test_what_to_write_instead(self):
        class Mine(keras_accum.GradientAccumulationModel):
            pass

        def behind():
            class Behind(keras.Model, keras_accum.GradientAccumulationMixin):
                pass

        cls = keras_accum.GradientAccumulationModel
        x = keras.Input((3,))
        for call, said in (
            (lambda: test_utils.mlp(cls, acum_steps=8), "mean `accum_steps`"),
            (lambda: Mine(microbatchsize=8), "mean `microbatch_size`"),
            (
                lambda: cls.from_model(test_utils.mlp(), acum_steps=8),
                "mean `accum_steps`",
            ),
            (lambda: cls.from_model(test_utils.mlp(), 8), "by name"),
            (lambda: cls(x, x, 8), "by name"),
            (lambda: cls([keras.layers.Dense(1)]), r"Sequential\(layers\)"),
            (behind, "in front of the model class: `class Behind"),
        ):
            with self.assertRaisesRegex((TypeError, ValueError), said):
                call()

    @pytest.mark.thorough
    def test_another_backend(self):
        code = (
            "import sys, types\n"
            "import keras\n"
            "keras.backend.backend = lambda: 'jax'\n"
            "import keras_accum\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(
            "ValueError: keras_accum needs the Keras backend", result.stderr
        )
        self.assertIn("Received: backend='jax'", result.stderr)


class NameTest(test_utils.TestCase):
    def test_all_of_the_public_names(self):
        self.assertEqual(
            sorted(keras_accum.__all__),
            [
                "GradientAccumulationMixin",
                "GradientAccumulationModel",
                "GradientAccumulator",
                "__version__",
                "plan",
                "rematerialize",
                "schedules",
                "verify",
            ],
        )
        for name in keras_accum.__all__:
            self.assertTrue(hasattr(keras_accum, name))
        # What Tab shows has no modules of ours.
        self.assertEqual(dir(keras_accum), sorted(keras_accum.__all__))

    def test_documented(self):
        for cls in (
            keras_accum.GradientAccumulationModel,
            keras_accum.GradientAccumulator,
        ):
            for name, value in vars(cls).items():
                if not name.startswith("_") and callable(value):
                    self.assertTrue(value.__doc__, msg=name)


class ExampleTest(test_utils.TestCase):
    def test_the_docstrings_example(self):
        inputs = keras.Input((32,))
        outputs = keras.layers.Dense(10)(inputs)
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, accum_steps=8
        )
        model.compile(
            optimizer="adam",
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(64, 32)), rng.integers(0, 10, 64)
        model.fit(x, y, batch_size=4, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 2)


if __name__ == "__main__":
    tf.test.main()
