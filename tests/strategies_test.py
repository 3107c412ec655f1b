"""The examples' strategies, those that one machine without a GPU can have.

A process has one of them: TensorFlow splits the CPU, and joins others, once.
"""

import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest
import tensorflow as tf

from examples import launch_workers
from examples import strategies

ROOT = pathlib.Path(__file__).absolute().parent.parent
# A guard against what never ends, however busy the machine is.
PLENTY = 600.0


def run(program):
    """Runs a Python program that imports `strategies` and `time`."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import time; from examples import strategies; {program}",
        ],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PLENTY,
    )


class MirroredTest(tf.test.TestCase):
    @pytest.mark.thorough
    def test_splits_the_cpu(self):
        finished = run(
            "made = strategies.mirrored(3);"
            "print(made.num_replicas_in_sync, strategies.is_chief(made))"
        )
        self.assertEqual(finished.stdout, "3 True\n", finished.stderr)

    @mock.patch.object(tf.config, "list_physical_devices", return_value=["GPU"])
    def test_needs_a_gpu_each(self, _):
        with self.assertRaisesRegex(ValueError, "1 GPUs for 2 replicas"):
            strategies.mirrored(2)


class MultiWorkerTest(tf.test.TestCase):
    def test_does_not_wait_forever_for_others(self):
        addresses = launch_workers.free_addresses(2)
        first, _ = launch_workers.environments(addresses, None)
        with (
            mock.patch.dict(os.environ, first),
            self.assertRaisesRegex(
                TimeoutError, f"did not listen within 1 seconds: {addresses[1]}"
            ),
        ):
            strategies.multi_worker(startup_timeout=1)

    def test_has_one_chief(self):
        strategy = mock.create_autospec(
            tf.distribute.MultiWorkerMirroredStrategy, instance=True
        )
        for index in range(2):
            text = json.dumps(
                {
                    "cluster": {"worker": ["a:1", "b:2"]},
                    "task": {"type": "worker", "index": index},
                }
            )
            with mock.patch.dict(os.environ, {"TF_CONFIG": text}):
                strategy.cluster_resolver = (
                    tf.distribute.cluster_resolver.TFConfigClusterResolver()
                )
                self.assertEqual(strategies.is_chief(strategy), index == 0)

    @pytest.mark.thorough
    def test_ends_a_process_that_python_cannot_stop(self):
        finished = run(
            "context = strategies._ending_the_process_after(0.1);"
            f"context.__enter__(); time.sleep({2 * PLENTY})"
        )
        self.assertEqual(finished.returncode, 1)
        self.assertIn("Timeout (0:00:00.1", finished.stderr)


class OneDeviceTest(tf.test.TestCase):
    def test_is_its_own_chief(self):
        strategy = strategies.one_device()
        self.assertEqual(strategy.num_replicas_in_sync, 1)
        self.assertTrue(strategies.is_chief(strategy))


if __name__ == "__main__":
    tf.test.main()
