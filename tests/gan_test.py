"""The GAN example: two optimizers in one window."""

import pathlib
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from examples import gan_training
from tests import test_utils

LEARNING_RATE, UPDATES = 0.002, 3


def train(accum_steps, dtype="float32", **kwargs):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (40, gan_training.SIDE**2)).astype(dtype)
    return gan_training.train(
        images,
        accum_steps,
        batch_size=30,
        updates=UPDATES,
        learning_rate=LEARNING_RATE,
        seed=0,
        **kwargs,
    )


class TrainingTest(tf.test.TestCase, parameterized.TestCase):
    # Adam divides by the size of a gradient, and so amplifies its rounding.
    @pytest.mark.thorough
    def test_same_weights(self):
        self.check("float32", 1e-4, True, 4)

    @parameterized.parameters(
        *test_utils.with_nightly(
            [
                ("float32", 1e-4, False, 30),
                ("float64", 1e-11, False, 4),
                ("float64", 1e-11, True, 30),
            ],
            [
                ("float32", 1e-4, False, 4),
                ("float32", 1e-4, True, 30),
                ("float64", 1e-11, False, 30),
                ("float64", 1e-11, True, 4),
            ],
        )
    )
    @test_utils.first_command(second=(0,))
    def test_same_weights_otherwise(
        self, dtype, bound, jit_compile, accum_steps
    ):
        self.check(dtype, bound, jit_compile, accum_steps)

    def check(self, dtype, bound, jit_compile, accum_steps):
        if dtype == "float64":
            keras.config.set_floatx("float64")
            keras.config.set_dtype_policy("float64")
            self.addCleanup(keras.config.set_floatx, "float32")
            self.addCleanup(keras.config.set_dtype_policy, "float32")
        large = train(1, dtype, jit_compile=jit_compile)
        accumulated = train(accum_steps, dtype, jit_compile=jit_compile)
        self.assertAllClose(large.losses, accumulated.losses, rtol=1e-5)
        for mine, theirs in zip(
            accumulated.weights, large.weights, strict=True
        ):
            self.assertEqual(mine.dtype, dtype)
            self.assertAllClose(
                mine, theirs, rtol=0, atol=bound * LEARNING_RATE * UPDATES
            )
        self.assertEqual(
            large.images.shape,
            (gan_training.DRAWN, gan_training.SIDE, gan_training.SIDE),
        )

    def test_both_networks_learn(self):
        before = [
            build().get_weights()
            for build in (
                gan_training.build_generator,
                gan_training.build_discriminator,
            )
        ]
        after = train(2).weights
        for start, end in zip(sum(before, []), after, strict=True):
            self.assertNotAllClose(start, end)


class CommandTest(tf.test.TestCase, parameterized.TestCase):
    def run_example(self, *flags):
        return test_utils.run_program("-m", "examples.gan", *flags)

    @pytest.mark.thorough
    def test_prints_a_table_and_draws(self):
        with tempfile.TemporaryDirectory() as folder:
            picture = pathlib.Path(folder) / "digits.png"
            run = self.run_example(
                f"--data_dir={folder}",
                "--updates=2",
                "--batch_size=50",
                "--accum_steps=3",
                f"--picture={picture}",
            )
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertEqual(run.stderr, "")
            self.assertIn("accumulated", run.stdout)
            self.assertEqual(picture.read_bytes()[:4], b"\x89PNG")

    @parameterized.parameters(
        (("--accum_steps=9", "--batch_size=8"), "--batch_size"),
        (("--picture=gan.jpg",), "--picture"),
        (("--updates=0",), "updates"),
        (("more",), "--name=value"),
    )
    @test_utils.first_command(second=(0,))
    def test_wrong_flags(self, flags, named):
        run = self.run_example(*flags)
        self.assertNotEqual(run.returncode, 0)
        self.assertIn(named, run.stderr + run.stdout)


if __name__ == "__main__":
    tf.test.main()
