"""The code of docs/own_steps.md runs as it stands, and does what it says."""

import pathlib
import re

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils

PAGE = pathlib.Path(__file__).absolute().parent.parent / "docs/own_steps.md"
RATE = 0.01


def run_blocks():
    """Runs the page's Python, and returns its names."""
    names = {}
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


class PageTest(test_utils.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.page = run_blocks()

    def data(self):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(32, 8)).astype("float32")
        return x, x[:, :1] * 2

    def fit(self, model):
        """Trains on 2 windows of 16 rows, whatever these are cut into."""
        x, y = self.data()
        steps = model.accum_steps
        model.fit(x, y, batch_size=16 // steps, shuffle=False, verbose=0)
        return model

    def students(self, student):
        """The weights of a student after each of the two updates."""
        plain = keras.models.clone_model(student)
        plain.set_weights(student.get_weights())
        plain.compile(keras.optimizers.SGD(RATE), loss="mse")
        x, y = self.data()
        for start in (0, 16):
            plain.train_on_batch(x[start : start + 16], y[start : start + 16])
            yield plain.get_weights()

    def strategy(self, replicas):
        if replicas == 1:
            return tf.distribute.get_strategy()
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        return strategy

    def test_the_gan_makes_updates(self):
        gan = self.page["gan"]
        for optimizer in (gan.d_optimizer, gan.g_optimizer):
            self.assertEqual(int(optimizer.iterations), 4)
        # Two updates by hand, and one.
        self.assertEqual(int(self.page["d_optimizer"].iterations), 2)
        self.assertEqual(int(self.page["g_optimizer"].iterations), 1)

    @parameterized.product(accum_steps=(1, 4), replicas=(1, 2))
    @test_utils.first_command(second=(3,))
    def test_a_teacher(self, accum_steps, replicas):
        with self.strategy(replicas).scope():
            model = self.page["MeanTeacher"](
                self.page["network"](),
                self.page["network"](),
                accum_steps=accum_steps,
            )
            model.compile(keras.optimizers.SGD(RATE), loss="mse")
        teacher = model.student.get_weights()
        for student in self.students(model.student):
            teacher = [
                0.99 * mine + 0.01 * theirs
                for mine, theirs in zip(teacher, student, strict=True)
            ]
        self.fit(model)
        self.assertAllClose(model.student.get_weights(), student, 1e-5, 1e-6)
        self.assertAllClose(model.teacher.get_weights(), teacher, 1e-5, 1e-6)

    @parameterized.parameters(1, 2)
    @test_utils.first_command(0)
    def test_a_target_and_a_counter(self, replicas):
        for period, copied in ((1, 1), (2, 1), (3, None)):
            with self.strategy(replicas).scope():
                model = self.page["WithTarget"](
                    self.page["network"](),
                    self.page["network"](),
                    period=period,
                    accum_steps=4,
                )
                model.compile(keras.optimizers.SGD(RATE), loss="mse")
            start = model.student.get_weights()
            students = list(self.students(model.student))
            self.fit(model)
            self.assertEqual(int(model.updates.numpy()), 2)
            expected = start if copied is None else students[copied]
            self.assertAllClose(
                model.teacher.get_weights(), expected, 1e-5, 1e-6
            )

    @parameterized.parameters(1, 2)
    @test_utils.first_command(second=(0,))
    def test_a_codebook(self, replicas):
        def make(accum_steps):
            keras.utils.set_random_seed(3)
            model = self.page["Codebook"](
                entries=4, features=3, accum_steps=accum_steps
            )
            model(tf.zeros((1, 8)))
            model.compile(keras.optimizers.SGD(RATE), loss="mse")
            return model

        with self.strategy(replicas).scope():
            model = make(4)
        expected = make(1)
        start = expected.codebook.numpy()
        for each in (model, expected):
            x, _ = self.data()
            each.fit(
                x,
                x,
                batch_size=16 // each.accum_steps,
                shuffle=False,
                verbose=0,
            )
        self.assertNotAllClose(start, expected.codebook)
        self.assertAllClose(
            expected.codebook.numpy(), model.codebook.numpy(), 1e-5, 1e-6
        )
        self.assertAllClose(
            expected.get_weights()[0], model.get_weights()[0], 1e-4, 1e-5
        )


class AlwaysCalledTest(test_utils.TestCase):
    def test_an_update_step_of_ones_own_makes_windows_of_one(self):
        class Own(keras_accum.GradientAccumulationModel):
            def update_step(self):
                super().update_step()

        plain = test_utils.mlp(keras_accum.GradientAccumulationModel)
        self.assertFalse(plain._accumulation.is_active)
        self.assertTrue(test_utils.mlp(Own)._accumulation.is_active)


if __name__ == "__main__":
    tf.test.main()
