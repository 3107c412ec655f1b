"""The README's examples run as they stand, and train as they say.

Each number of devices has a process: TensorFlow splits the CPU once, and the
last block takes all that there are. The lines that swap the class run twice:
without what they add, and without what they remove.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest

ROOT = pathlib.Path(__file__).absolute().parent.parent
README = ROOT / "README.md"

SPLIT = """
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * {devices},
)
"""
# What a program has before the lines of the swap, and after them. The process
# has both programs, and each has its own names.
BEFORE = """
import keras
import numpy as np

keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
x = rng.normal(size=(1024, 32)).astype("float32")
y = rng.integers(0, 10, 1024)
inputs = keras.Input((32,))
hidden = keras.layers.Dense(16, activation="relu")(inputs)
outputs = keras.layers.Dense(10)(hidden)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
start = np.concatenate(
    [w.numpy().ravel() for w in keras.Model(inputs, outputs).weights]
)
np.random.seed(1)  # The order of the rows.
"""
AFTER = """
weights = np.concatenate([w.numpy().ravel() for w in model.weights])
print('class', type(model).__name__)
print('updates', model.optimizer.iterations.numpy())
print('weights', (weights - start).tolist())
"""
# What TensorFlow says of the machine, whoever trains.
HARMLESS = re.compile(
    r"^([EIW]0000 |WARNING: All log messages|To enable the following)"
    r"|There are non-GPU devices in `tf.distribute.Strategy`"
)


def blocks(language="python"):
    """Returns the code of the README in a language, in its order."""
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def side(diff, mark):
    """Returns the lines of a diff that are not marked."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[0] != mark)


def run(*code):
    """Runs Python in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


class ReadmeTest(absltest.TestCase):
    def test_swap(self):
        (diff,) = blocks("diff")
        programs = [
            "\n".join([BEFORE, side(diff, mark), AFTER]) for mark in "+-"
        ]
        finished = run(*(f"exec({each!r}, {{}})" for each in programs))
        self.assertEqual(finished.returncode, 0, finished.stderr)
        self.assertEqual(
            re.findall("class ([A-Za-z]*)", finished.stdout),
            ["Functional", "GradientAccumulationModel"],
        )
        # 1024 rows make 4 updates of 256.
        self.assertEqual(
            re.findall("updates .*", finished.stdout), ["updates 4"] * 2
        )
        moved = [
            np.array(json.loads(weights))
            for weights in re.findall("weights (.*)", finished.stdout)
        ]
        distance = np.linalg.norm(moved[0] - moved[1])
        self.assertGreater(np.linalg.norm(moved[0]), 0.01)
        self.assertLess(distance / np.linalg.norm(moved[0]), 1e-4)

    def test_examples(self):
        self.check_examples(devices=2)

    @pytest.mark.thorough
    def test_examples_on_one_device(self):
        self.check_examples(devices=1)

    def check_examples(self, devices):
        accumulated, replicated = blocks()
        updates = "print('updates', model.optimizer.iterations.numpy())"
        finished = run(
            SPLIT.format(devices=devices),
            *(accumulated, updates, replicated, updates),
            "print('replicas', strategy.num_replicas_in_sync)",
        )
        self.assertEqual(finished.returncode, 0, finished.stderr)
        # 1024 rows make 8 updates of 8 x 16 rows, in each of two epochs; and of
        # 16 micro-batches of 64 rows, 2.
        self.assertEqual(
            re.findall(r"(?:updates|replicas) \d+", finished.stdout),
            ["updates 16", "updates 2", f"replicas {devices}"],
        )
        complaints = [
            line
            for line in finished.stderr.splitlines()
            if line and not HARMLESS.search(line)
        ]
        self.assertEqual(complaints, [])


if __name__ == "__main__":
    absltest.main()
