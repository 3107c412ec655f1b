"""The digits example, from its flags to its table and its picture."""

import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import parameterized

from examples import digits
from examples import digits_dataset
from examples import digits_training

ROOT = pathlib.Path(__file__).absolute().parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_example(command, *arguments):
    """Runs the example as a user would, in the project's root."""
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        # What `pip install` does for the library.
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )


def settings(**changes):
    """Settings of a training that takes two seconds."""
    values = {
        "dataset": "digits",
        "data_dir": None,
        "batch_size": 600,
        "accum_steps": 3,
        "epochs": 1,
        "learning_rate": 0.006,
        "precision": "float32",
        "jit_compile": False,
        "seed": 0,
    }
    return digits_training.Settings(**(values | changes))


class DatasetTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.data_dir = os.path.join(tf.test.get_temp_dir(), "dataset")
        cls.train, cls.test, cls.info = digits_dataset.open_dataset(
            "digits", cls.data_dir
        )

    def test_holds_every_digit_of_scikit_learn(self):
        self.assertLen(self.train, 1_438)
        self.assertLen(self.test, 359)
        for images in self.train, self.test:
            image, label = images.element_spec
            self.assertEqual((image.shape, image.dtype), ((8, 8, 1), tf.uint8))
            self.assertEqual((label.shape, label.dtype), ((), tf.int64))

    def test_scales_the_ink_to_a_byte(self):
        pixels = np.stack([image for image, _ in self.train.as_numpy_iterator()])
        self.assertEqual((pixels.min(), pixels.max()), (0, 255))

    def test_has_each_label_in_each_split(self):
        self.assertEqual(self.info.features["label"].num_classes, 10)
        for images in self.train, self.test:
            labels = {int(label) for _, label in images.as_numpy_iterator()}
            self.assertEqual(labels, set(range(10)))

    def test_is_the_same_every_time(self):
        other_dir = os.path.join(tf.test.get_temp_dir(), "again")
        again, _, _ = digits_dataset.open_dataset("digits", other_dir)
        for images in self.train, again:
            self.assertAllEqual(
                [label for _, label in images.as_numpy_iterator()],
                [label for _, label in self.train.as_numpy_iterator()],
            )

    def test_is_registered(self):
        self.assertIn("digits", tfds.list_builders())
