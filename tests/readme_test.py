"""The README's examples run as they stand, and train as they say.

Each number of devices has a process: TensorFlow splits the CPU once, and the
last block takes all that there are.
"""

import os
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).absolute().parent.parent
README = ROOT / "README.md"

SPLIT = """
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * {devices},
)
"""
# What TensorFlow says of the machine, whoever trains.
HARMLESS = re.compile(
    r"^([EIW]0000 |WARNING: All log messages|To enable the following)"
    r"|There are non-GPU devices in `tf.distribute.Strategy`"
)


def blocks():
    """Returns the Python of the README, in its order."""
    text = README.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(*code):
    """Runs Python in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


class ReadmeTest(parameterized.TestCase):
    @parameterized.parameters(1, 2)
    def test_examples(self, devices):
        accumulated, microbatched, replicated = blocks()
        updates = "print('updates', model.optimizer.iterations.numpy())"
        finished = run(
            SPLIT.format(devices=devices),
            *(accumulated, updates, microbatched, updates, replicated, updates),
            "print('replicas', strategy.num_replicas_in_sync)",
        )
        self.assertEqual(finished.returncode, 0, finished.stderr)
        # 1024 rows make 8 updates of 8 x 16 rows, in each of two epochs; 4 of
        # 256; and of 16 micro-batches of 64 rows, 2.
        self.assertEqual(
            re.findall(r"(?:updates|replicas) \d+", finished.stdout),
            ["updates 16", "updates 4", "updates 2", f"replicas {devices}"],
        )
        complaints = [
            line
            for line in finished.stderr.splitlines()
            if line and not HARMLESS.search(line)
        ]
        self.assertEqual(complaints, [])


if __name__ == "__main__":
    absltest.main()
