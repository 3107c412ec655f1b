"""Training on several workers, beside one process with one device."""

import os
import pathlib
import shutil
import signal
import tempfile
import unittest

import numpy as np
import pytest
import tensorflow as tf

from tests import test_utils
from tests import worker_cases
from tests import worker_processes

TEMP_DIR = tempfile.mkdtemp()
# As for a window's gradient: float32 leaves about 100 of its units.
TOLERANCE = 1e-5
# Half precision has 11 bits, and each share of rows is rounded by itself.
# A gradient that is sent as bfloat16 is off by 2**-8 at most. Adam has squares,
# which are off by twice that. `reduction_test` is strict about the weights.
TOLERANCES = {"float16": 2.0**-9, "rounded": 2.0**-7}

# What differs in how it is done, and not in what comes of it.
ALIKE = {"arrays": "plain"}

_alone = {}


def setUpModule():
    # Where processes share tests, one may come back to this module.
    os.makedirs(TEMP_DIR, exist_ok=True)


def tearDownModule():
    shutil.rmtree(TEMP_DIR)


def alone(name, workers):
    """Returns what a case returns in this process, on one device."""
    case = worker_cases.CASES[name]
    # Where each worker has rows of its own, their number matters.
    key = name, workers if name in ("files", "own") else None
    if key not in _alone:
        _alone[key] = case(
            worker_cases.Place(
                strategy=tf.distribute.get_strategy(),
                folder=pathlib.Path(TEMP_DIR),
                index=0,
                workers=workers,
                alone=True,
            )
        )
    return _alone[key]


class WorkersTestCase(test_utils.TestCase):
    def run_cases(self, names, workers, replicas=1, folder=None, **others):
        """Runs cases to their end; returns where the results are."""
        folder = folder or pathlib.Path(tempfile.mkdtemp(dir=TEMP_DIR))
        for index, ended in enumerate(
            worker_processes.run_cases(
                names, folder, workers, replicas, **others
            )
        ):
            self.assertEqual(
                ended.status, 0, f"Worker {index}:\n{ended.output[-5000:]}"
            )
        return folder

    def assertAsAlone(self, folder, workers, name, reference=None):
        """Compares what each worker returned with one device."""
        expected = alone(reference or name, workers)
        everyone = worker_processes.results(folder, workers, name)
        self.assertSameCopies(everyone, f"{name} on {workers} workers")
        tolerance = TOLERANCES.get(name, TOLERANCE)
        for key, value in expected.items():
            if key.startswith("copy/"):
                continue
            scale = np.abs(value).max() + 1e-30
            for actual in everyone:
                self.assertAllClose(
                    actual[key] / scale,
                    value / scale,
                    rtol=0,
                    atol=tolerance,
                    msg=f"{key} of {name} on {workers} workers",
                )

    def assertSameCopies(self, everyone, name):
        """Compares all copies of all variables, to the bit."""
        seen = {}
        for actual in everyone:
            for key, value in actual.items():
                if key.startswith("copy/"):
                    variable = key.split("/")[1]
                    first = seen.setdefault(variable, value)
                    self.assertAllEqual(value, first, f"{key} of {name}")
        self.assertNotEmpty(seen)


class EquivalenceTest(WorkersTestCase):
    def check(self, workers, replicas, names, others=()):
        folder = self.run_cases([*names, *others], workers, replicas)
        for name in names:
            with self.subTest(name):
                self.assertAsAlone(folder, workers, name, ALIKE.get(name))
        return folder

    # As TensorFlow has it on a CPU. Several replicas are tested by replacing
    # what it finds there.
    def test_two_workers(self):
        self.check(2, 1, ["own"])

    @pytest.mark.thorough
    def test_two_workers_with_one_replica(self):
        names = ["arrays", "float16", "rounded"]
        names = test_utils.with_nightly(names, ["files"])
        folder = self.check(2, 1, names, others=["noise", "collectives"])
        self.assertReducesAtBoundaries(folder, replicas=1)
        with self.subTest("Workers agree on windows that follow the noise."):
            found = worker_processes.results(folder, 2, "noise")
            self.assertSameCopies(found, "noise")
            for result in found:
                self.assertAllEqual(result["updates"], found[0]["updates"])
            _, windows = np.unique(found[0]["updates"], return_counts=True)
            # 64 rows are 8 steps; each has a micro-batch of each worker.
            self.assertAllEqual(windows[1:8], [1] * 7)
            self.assertBetween(windows[-2], 4, 16)

    @pytest.mark.thorough
    def test_three_workers(self):
        # Of more than two, each adds up a share of what is rounded.
        self.check(3, 1, ["rounded"])

    @test_utils.at_night
    def test_two_workers_with_two_replicas(self):
        names = ["masks", "files", "plain", "rounded"]
        folder = self.check(2, 2, names, others=["collectives"])
        self.assertReducesAtBoundaries(folder, replicas=2)

    def assertReducesAtBoundaries(self, folder, replicas):
        for found in worker_processes.results(folder, 2, "collectives"):
            with self.subTest("Reductions are at boundaries alone."):
                # One for each of this worker's replicas, in one branch.
                for name in ("arrays", "known"):
                    self.assertAllEqual(found[f"{name}/branches"], [replicas])
                    self.assertEmpty(found[f"{name}/others"])
                # TensorFlow asks, once a step, whether anyone has data left.
                self.assertAllEqual(found["unknown/branches"], [replicas])
                self.assertAllEqual(found["unknown/others"], [1])

    @test_utils.at_night
    def test_four_workers_with_one_replica(self):
        self.check(4, 1, ["masks", "own"])

    @test_utils.at_night
    def test_four_workers_with_two_replicas(self):
        self.check(4, 2, ["undisturbed"])


@pytest.mark.thorough
class CheckpointTest(WorkersTestCase):
    def test_resumes(self):
        # `FaultTest` goes on from a `tf.train.Checkpoint`, too.
        names = test_utils.with_nightly(
            ["model_checkpoint", "backup_and_restore"], ["tf_checkpoint"]
        )
        folder = self.run_cases(names, workers=2)
        for name in names:
            with self.subTest(name):
                self.assertAsAlone(folder, 2, name, reference="undisturbed")
        with self.subTest("What others than the chief saved is gone."):
            self.assertEmpty(list(folder.glob("temporary-*")))
        with self.subTest("The chief's are kept."):
            kept = folder / "model-checkpoint"
            self.assertCountEqual(
                [path.name for path in kept.iterdir()], ["1.keras", "2.keras"]
            )


@pytest.mark.thorough
class FaultTest(WorkersTestCase):
    @unittest.skipIf(os.name == "nt", "Windows has no SIGKILL.")
    def test_goes_on_after_a_worker_was_killed(self):
        folder = pathlib.Path(tempfile.mkdtemp(dir=TEMP_DIR))
        survivor, killed = worker_processes.run_cases(
            ["killed"], folder, workers=2
        )
        self.assertEqual(killed.status, -signal.SIGKILL, killed.output[-5000:])
        # It says who is lost, and does not wait until it is killed itself.
        self.assertNotIn(survivor.status, (0, -signal.SIGKILL))
        self.assertRegex(survivor.output, "UnavailableError")
        self.run_cases(["restarted"], workers=2, folder=folder)
        self.assertAsAlone(folder, 2, "restarted", reference="undisturbed")
        for result in worker_processes.results(folder, 2, "restarted"):
            self.assertEqual(result["done"], 2)


if __name__ == "__main__":
    tf.test.main()
