"""Other numbers of replicas than two, each in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf
from absl.testing import parameterized

from tests import replicas_test
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
# Claims that depend on how many replicas there are.
CLAIMS = ("RowsTest", "StateTest", "PrecisionTest")


class ReplicaCountsTest(tf.test.TestCase, parameterized.TestCase):
    def test_rows_on_four_replicas(self):
        self.check("mirrored_4", "RowsTest")

    @parameterized.parameters(
        *test_utils.with_nightly(
            [
                ("one_device", *CLAIMS),
                ("mirrored_1", *CLAIMS),
                ("mirrored_4", "RowsTest", "PrecisionTest"),
                ("mirrored_8", "RowsTest"),
            ],
            [
                ("mirrored_4", "StateTest"),
                ("mirrored_8", "StateTest", "PrecisionTest"),
            ],
        )
    )
    @pytest.mark.thorough
    def test_in_a_process_of_its_own(self, strategy, *claims):
        self.check(strategy, *claims)

    def check(self, strategy, *claims):
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        finished = subprocess.run(
            [
                sys.executable,
                replicas_test.__file__,
                f"--strategy={strategy}",
                *claims,
            ],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        self.assertEqual(finished.returncode, 0, finished.stderr)
        self.assertRegex(finished.stderr, r"Ran [1-9]\d* tests")


if __name__ == "__main__":
    tf.test.main()
