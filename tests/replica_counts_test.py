"""Other numbers of replicas than two, each in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
REPLICAS = "tests/replicas_test.py"
ROWS, STATE, PRECISION, WINDOWS, ONE = (
    f"{REPLICAS}::{name}Test"
    for name in ("Rows", "State", "Precision", "Window", "OneReplica")
)
RESUMED = "tests/checkpoint_test.py::ReplicasTest"
# All that goes over two replicas, in whatever module.
EVERYTHING = (
    REPLICAS,
    RESUMED,
    "tests/auto_size_test.py::FindingTest::test_replicas_take_the_same_size",
    "tests/microbatching_test.py::EffectiveBatchSizeTest::test_replicas_count",
    "tests/nonfinite_test.py::DistributionTest",
    "tests/quantization_test.py::QuantizationTest::test_scales_on_several_replicas",
)


class ReplicaCountsTest(parameterized.TestCase):
    @parameterized.parameters(
        *test_utils.with_nightly(
            [
                # Scripts for any number of GPUs run on one of them mostly. Its
                # programs are those without a strategy, which all other tests
                # are about.
                ("one_device", STATE, PRECISION),
                ("mirrored_1", WINDOWS, ONE),
                ("multi_worker_1", ROWS),
                ("mirrored_4", ROWS, PRECISION),
            ],
            [
                ("one_device", ROWS),
                ("mirrored_1", *EVERYTHING),
                ("multi_worker_1", *EVERYTHING),
                ("mirrored_4", STATE),
                ("mirrored_8", ROWS, STATE, PRECISION),
            ],
        )
    )
    @test_utils.first_command(1, 3)
    @pytest.mark.thorough
    @pytest.mark.long
    def test_thorough(self, strategy, *claims):
        # XLA, and what else repeats a claim, is for the night.
        marks = "" if test_utils.IS_NIGHTLY else "not thorough"
        self.check(strategy, *claims, "-m", marks)

    def check(self, strategy, *arguments):
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
                *(f"--strategy={strategy}", *arguments),
            ],
            env=os.environ | {"PYTHONPATH": path},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        self.assertEqual(finished.returncode, 0, finished.stdout)
        self.assertRegex(finished.stdout, r"[1-9]\d* passed")


if __name__ == "__main__":
    absltest.main()
