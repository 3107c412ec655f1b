"""Trainings with the same seed end with the same bits."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_accum
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
ARGUMENTS = {
    "accum_steps": {"accum_steps": 3},
    "microbatch_size": {"microbatch_size": 3},
}


def train(name):
    """Trains with all kinds of layers; returns the digest of the weights."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.RandomFlip()(inputs)
    hidden = keras.layers.Conv2D(8, 3, activation="relu")(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.Dropout(0.3)(hidden)
    hidden = keras.layers.MaxPooling2D()(hidden)
    hidden = keras.layers.Flatten()(hidden)
    outputs = keras.layers.Dense(4)(hidden)
    model = keras_accum.GradientAccumulationModel(
        inputs, outputs, **ARGUMENTS[name]
    )
    # Keras leaves XLA out where operations are to be deterministic.
    model.compile(
        "adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8, 8, 3)).astype("float32")
    model.fit(x, rng.integers(0, 4, 50), batch_size=8, epochs=2, verbose=0)
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    return hashlib.sha256(weights).hexdigest()


def print_digests(trainings):
    """Prints one of each training in each way to accumulate, as JSON."""
    tf.config.experimental.enable_op_determinism()
    digests = {
        name: [train(name) for _ in range(trainings)] for name in ARGUMENTS
    }
    print(json.dumps(digests))


class DeterminismTest(tf.test.TestCase):
    @test_utils.at_night
    def test_same_bits(self):
        # In processes of their own: it cannot be switched off again.
        outputs = []
        for trainings in (2, 1):
            path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
            run = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "from tests import determinism_test as test;"
                    f" test.print_digests({trainings})",
                ],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
            )
            self.assertEqual(run.returncode, 0, run.stderr)
            outputs.append(json.loads(run.stdout.splitlines()[-1]))
        for name in ARGUMENTS:
            digests = {*outputs[0][name], *outputs[1][name]}
            self.assertLen(digests, 1, name)
        self.assertNotEqual(*[outputs[0][name][0] for name in ARGUMENTS])


if __name__ == "__main__":
    tf.test.main()
