"""The digits example, from its flags to its table and its picture."""

import copy
import os
import pathlib
import re
import shutil
import tempfile
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import parameterized

from examples import digits
from examples import digits_dataset
from examples import digits_training
from tests import test_utils

TEMP_DIR = tempfile.mkdtemp()

# 1,438 images make windows of 600, 600 and 238; with micro-batches of 200 the
# last one has two, of 200 and of 38.
BATCH_SIZE, ACCUM_STEPS, UPDATES = 600, 3, 3
LEARNING_RATE = 0.006

# Adam moves a weight by about the learning rate per update.
MOVED = LEARNING_RATE * UPDATES
# Both trainings add up the same numbers in another order. Adam divides what
# comes of it by its size, so a small gradient's rounding counts like a large
# gradient's: ten times the bound of other optimizers in float32.
FLOAT32_BOUND = 1e-4 * MOVED
FLOAT64_BOUND = 1e-12 * MOVED


def setUpModule():
    # Where processes share tests, one may come back to this module.
    os.makedirs(TEMP_DIR, exist_ok=True)


def tearDownModule():
    shutil.rmtree(TEMP_DIR)


def settings(**changes):
    """Returns the settings of a training that takes two seconds."""
    values = {
        "dataset": "digits",
        "data_dir": os.path.join(TEMP_DIR, "datasets"),
        "batch_size": BATCH_SIZE,
        "accum_steps": ACCUM_STEPS,
        "microbatch_size": None,
        "epochs": 1,
        "learning_rate": LEARNING_RATE,
        "precision": "float32",
        "jit_compile": False,
        "seed": 0,
    }
    return digits_training.Settings(**(values | changes))


def unbatched(images):
    """Returns all images and all labels as two arrays."""
    return next(images.batch(len(images)).as_numpy_iterator())


class DatasetTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train, cls.test, cls.info = digits_dataset.open_dataset(
            "digits", settings().data_dir
        )

    def test_holds_every_digit_of_scikit_learn(self):
        self.assertLen(self.train, 1_438)
        self.assertLen(self.test, 359)
        for images in self.train, self.test:
            image, label = images.element_spec
            self.assertEqual((image.shape, image.dtype), ((8, 8, 1), tf.uint8))
            self.assertEqual((label.shape, label.dtype), ((), tf.int64))

    def test_scales_the_ink_to_a_byte(self):
        images, _ = unbatched(self.train)
        self.assertEqual((images.min(), images.max()), (0, 255))

    def test_has_each_label_in_each_split(self):
        self.assertEqual(self.info.features["label"].num_classes, 10)
        for images in self.train, self.test:
            self.assertEqual(set(unbatched(images)[1]), set(range(10)))

    def test_is_the_same_wherever_it_is_prepared(self):
        again, _, _ = digits_dataset.open_dataset(
            "digits", os.path.join(TEMP_DIR, "again")
        )
        for one, other in zip(
            unbatched(self.train), unbatched(again), strict=True
        ):
            self.assertAllEqual(one, other)

    def test_is_registered(self):
        self.assertIn("digits", tfds.list_builders())


class DatasetErrorsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("no_such_set", "Dataset no_such_set not found"),
        ("imdb_reviews", "it has no labeled images of one shape"),
        ("cats_vs_dogs", "it has no labeled images of one shape"),
    )
    def test_names_what_is_wrong_with_a_set(self, name, reason):
        with self.assertRaises(SystemExit) as caught:
            digits_dataset.open_dataset(name, settings().data_dir)
        self.assertStartsWith(
            caught.exception.code, f"--dataset={name} cannot be used ({reason})"
        )
        self.assertNotIn("\n", caught.exception.code)

    @mock.patch.object(tfds.core.DatasetBuilder, "download_and_prepare")
    def test_names_the_set_that_needs_no_network(self, download_and_prepare):
        download_and_prepare.side_effect = ConnectionError("no route\nto host")
        with self.assertRaises(SystemExit) as caught:
            digits_dataset.open_dataset("mnist", settings().data_dir)
        self.assertStartsWith(
            caught.exception.code, "--dataset=mnist cannot be used (no route). "
        )
        self.assertEndsWith(caught.exception.code, "`digits` needs no network.")


class TrainingTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(keras.config.set_floatx, keras.config.floatx())
        self.addCleanup(
            keras.config.set_dtype_policy, keras.config.dtype_policy()
        )

    def assert_same_training(self, large, accumulated, updates, bound):
        self.assertEqual(large.updates, updates)
        self.assertEqual(accumulated.updates, updates)
        self.assertEqual(large.accuracy, accumulated.accuracy)
        self.assertLen(large.losses, updates)
        # The losses that Keras reports are float32 in every precision.
        self.assertAllClose(large.losses, accumulated.losses, rtol=1e-5)
        self.assertLessEqual(
            digits.largest_difference(large, accumulated), bound
        )

    @pytest.mark.thorough
    def test_gives_the_weights_of_the_large_batch(self):
        float64 = settings(precision="float64")
        self.assert_same_training(
            digits_training.train(float64, accumulate=False),
            digits_training.train(float64, accumulate=True),
            UPDATES,
            FLOAT64_BOUND,
        )

    @pytest.mark.thorough
    def test_gives_the_same_weights_by_a_size_that_does_not_divide(self):
        self.check_size(250)

    @pytest.mark.thorough
    def test_gives_the_same_weights_by_a_size_that_divides_the_batch(self):
        self.check_size(200)

    def check_size(self, size):
        float64 = settings(
            precision="float64", accum_steps=None, microbatch_size=size
        )
        self.assert_same_training(
            digits_training.train(float64, accumulate=False),
            digits_training.train(float64, accumulate=True),
            UPDATES,
            FLOAT64_BOUND,
        )

    @pytest.mark.thorough
    def test_takes_other_sets(self):
        # 20 images in windows of 8, 8 and 4: one micro-batch in the last.
        mnist = settings(dataset="mnist", batch_size=8, accum_steps=2)
        with tfds.testing.mock_data(num_examples=20):
            large = digits_training.train(mnist, accumulate=False)
            accumulated = digits_training.train(mnist, accumulate=True)
        self.assert_same_training(large, accumulated, 3, FLOAT32_BOUND)
        # The first layer's 3x3 kernels see 28x28 images of one channel, which
        # the pooling halves before the last layer sees them.
        self.assertEqual(large.weights[-2].shape, (14 * 14 * 64, 10))


class UpdateLossesTest(tf.test.TestCase):
    def test_takes_the_means_of_keras_apart(self):
        # Five steps of 2 images, two to an update, in an epoch of 9 images:
        # updates of 4, 4 and 1 images, whose losses are 3, 5 and 7.
        losses = digits_training.UpdateLosses(
            step_size=2, batch_size=4, epoch_size=9
        )
        sums = np.cumsum([2 * 2, 2 * 4, 2 * 5, 2 * 5, 1 * 7])
        for epoch in range(2):
            losses.on_epoch_begin(epoch)
            for step, (total, images) in enumerate(
                zip(sums, [2, 4, 6, 8, 9], strict=True)
            ):
                losses.on_train_batch_end(step, {"loss": total / images})
        self.assertAllClose(losses.losses, [3, 5, 7, 3, 5, 7])


class TableTest(tf.test.TestCase):
    def run_with(self, *weights):
        return digits_training.Run(
            updates=1,
            accuracy=0.5,
            weights=[np.asarray(weight) for weight in weights],
            losses=[1.0],
            peak_mib=1000.0,
            seconds=1.0,
        )

    def test_shows_the_largest_difference_of_all_weights(self):
        one = self.run_with([1.0, 2.0], [[3.0]])
        other = self.run_with([1.0, 2.5], [[2.75]])
        self.assertEqual(digits.largest_difference(one, other), 0.5)
        large, accumulated = digits.table(one, other).splitlines()[1:]
        self.assertEqual(
            large.split(),
            "large batch 1 0.5000 0 1,000 MiB 1.0".split(),
        )
        self.assertEqual(
            accumulated.split(),
            "accumulated 1 0.5000 0.5 1,000 MiB 1.0".split(),
        )

    def test_does_not_hide_nan(self):
        one = self.run_with([1.0], [2.0])
        other = self.run_with([1.0], [np.nan])
        self.assertIn("nan", digits.table(one, other))


class FlagsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("--accum_steps=0", "positive integer"),
        ("--accum_steps=2.5", "--accum_steps"),
        ("--accum_steps=5", "must be a multiple of --accum_steps"),
        ("--batch_size=100", "must be a multiple of --accum_steps"),
        ("--microbatch_size=0", "must be a positive integer or auto"),
        ("--microbatch_size=-8", "must be a positive integer or auto"),
        ("--microbatch_size=2.5", "must be a positive integer or auto"),
        ("--microbatch_size=large", "must be a positive integer or auto"),
        ("--batch_size=-512", "positive integer"),
        ("--epochs=0", "positive integer"),
        ("--learning_rate=-1", "non-negative number"),
        ("--seed=-1", "--seed"),
        ("--precision=int8", "float32\\|float64"),
        ("--picture=/no/such/folder/digits.png", "a folder that exists"),
        ("--picture=digits.txt", "must name a .png file"),
    )
    def test_says_what_to_do_about(self, argument, message):
        values = copy.deepcopy(digits.FLAGS)
        with self.assertRaisesRegex(flags.IllegalFlagValueError, message):
            values(["digits", argument])

    # Also with the value that it has by default.
    @parameterized.parameters("--accum_steps=4", "--accum_steps=8")
    def test_takes_one_way_to_split_the_batch(self, argument):
        values = copy.deepcopy(digits.FLAGS)
        with self.assertRaisesRegex(
            flags.IllegalFlagValueError, "give one of them"
        ):
            values(["digits", argument, "--microbatch_size=64"])

    def test_says_what_to_do_about_a_forgotten_dash(self):
        with self.assertRaisesRegex(SystemExit, "Received: epochs=3"):
            digits.main(["digits", "epochs=3"])

    @parameterized.parameters(
        ([], 8, None, "8 micro-batches of 64 images per update"),
        (
            ["--accum_steps=2"],
            2,
            None,
            "2 micro-batches of 256 images per update",
        ),
        (
            ["--microbatch_size=100"],
            None,
            100,
            "512 images per update, at most 100 at once",
        ),
        (
            ["--microbatch_size=auto"],
            None,
            "auto",
            "512 images per update, as many as fit at once",
        ),
    )
    def test_takes(self, arguments, accum_steps, microbatch_size, heading):
        values = copy.deepcopy(digits.FLAGS)
        values(["digits", *arguments])
        with mock.patch.object(digits, "FLAGS", values):
            found = digits.settings_from_flags()
        self.assertEqual(found.accum_steps, accum_steps)
        self.assertEqual(found.microbatch_size, microbatch_size)
        self.assertEqual(digits.heading(found), heading)


class ProgramTest(tf.test.TestCase, parameterized.TestCase):
    @test_utils.at_night
    def test_compares_both_trainings(self):
        picture = pathlib.Path(TEMP_DIR) / "digits.png"
        finished = test_utils.run_program(
            "-m",
            "examples.digits",
            f"--data_dir={settings().data_dir}",
            f"--batch_size={BATCH_SIZE}",
            f"--accum_steps={ACCUM_STEPS}",
            "--epochs=1",
            f"--learning_rate={LEARNING_RATE}",
            f"--picture={picture}",
        )
        self.assertEqual(finished.returncode, 0, finished.stderr)
        self.assertNotIn("Warning", finished.stderr)
        # What TensorFlow says of the machine, if it is not stopped.
        self.assertNotIn("oneDNN", finished.stderr)
        # Keras's progress bars, of the large batches and of the micro-batches.
        self.assertIn("3/3", finished.stdout)
        self.assertIn("8/8", finished.stdout)
        rows = re.findall(
            r"^(large batch|accumulated) +(\d+) +([\d.]+) +([\d.e+-]+)"
            r" +([\d,]+) MiB +[\d.]+$",
            finished.stdout,
            re.MULTILINE,
        )
        self.assertLen(rows, 2)
        for name, updates, accuracy, difference, peak in rows:
            with self.subTest(name):
                self.assertEqual(int(updates), UPDATES)
                self.assertEqual(accuracy, rows[0][2])
                self.assertLessEqual(float(difference), FLOAT32_BOUND)
                # TensorFlow alone is more than 100 MiB.
                self.assertGreater(int(peak.replace(",", "")), 100)
        image = tf.io.decode_png(picture.read_bytes())
        # Not blank: both curves, the axes and the paper have colors.
        self.assertGreater(len(np.unique(image)), 10)

    # `FlagsTest` has all that it says of flags.
    @parameterized.parameters(
        ("--dataset=no_such_set", "`digits` needs no network"),
        ("--batch_size=100", "must be a multiple of"),
    )
    @test_utils.first_command(second=(0,))
    def test_says_what_to_do_and_no_more(self, argument, message):
        finished = test_utils.run_program("examples/digits.py", argument)
        self.assertEqual(finished.returncode, 1)
        self.assertEqual(finished.stdout, "")
        self.assertIn(message, finished.stderr)
        # absl adds a line on how to see all flags.
        self.assertLessEqual(finished.stderr.count("\n"), 2)


if __name__ == "__main__":
    tf.test.main()
