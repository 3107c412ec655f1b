"""The language model example on several workers, started as a user would."""

import os
import pathlib
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import unittest

import keras
import pytest
import tensorflow as tf

from examples import language_model_network
from examples import launch_workers
from tests import test_utils
from tests import worker_processes

TEMP_DIR = tempfile.mkdtemp()
# What the launcher gives workers to end; and a guard against what never ends,
# however busy the machine is.
GRACE, PLENTY = 2.0, 900.0
SIZES = {"context": 16, "layers": 1, "width": 8, "heads": 2}
TINY = SIZES | {
    "epochs": 2,
    "updates_per_epoch": 2,
    "warmup_updates": 1,
    "batch_size": 4,
    "accum_steps": 2,
    "sample_length": 0,
    "jit_compile": False,
}


def setUpModule():
    # Where processes share tests, one may come back to this module.
    os.makedirs(TEMP_DIR, exist_ok=True)


def tearDownModule():
    shutil.rmtree(TEMP_DIR)


def program(**values):
    """Returns the command that runs the program with small flags."""
    arguments = [f"--{k}={v}" for k, v in (TINY | values).items()]
    return [sys.executable, "-m", "examples.language_model", *arguments]


def launcher(*command, workers=2):
    """Returns the command that runs another one in several workers."""
    return [
        sys.executable,
        "-m",
        "examples.launch_workers",
        f"--workers={workers}",
        f"--grace={GRACE}",
        "--",
        *command,
    ]


def finished(commands, environments=None):
    """Runs commands at the same time, to their ends."""
    folders = [pathlib.Path(tempfile.mkdtemp(dir=TEMP_DIR)) for _ in commands]
    processes = [
        worker_processes.start(command, folder, **environment)
        for command, folder, environment in zip(
            commands, folders, environments or [{}] * len(commands), strict=True
        )
    ]
    return worker_processes.wait_for(processes, folders)


def trained_weights(model):
    """Returns the weights that learn anything.

    Softmax takes back what the bias of a key adds to all logits: its gradient
    is rounding alone, of which Adam makes steps as long as any.
    """
    return [w.numpy() for w in model.weights if not w.path.endswith("key/bias")]


@pytest.mark.thorough
class TrainingTest(test_utils.TestCase):
    @test_utils.at_night
    def test_gives_the_weights_of_one_process(self):
        folders = {
            name: os.path.join(TEMP_DIR, name)
            for name in ("one", "mirrored", "multi_worker")
        }
        commands = {
            name: program(strategy=name, checkpoint_dir=folder)
            for name, folder in folders.items()
        }
        commands["mirrored"].append("--replicas=2")
        commands["multi_worker"] = launcher(*commands["multi_worker"])
        results = dict(
            zip(commands, finished(list(commands.values())), strict=True)
        )
        weights = {}
        for name, ended in results.items():
            self.assertEqual(ended.status, 0, f"{name}:\n{ended.output}")
            self.assertCountEqual(
                os.listdir(folders[name]),
                ["epoch-00002.weights.h5", "model.keras"],
            )
            path = os.path.join(folders[name], "model.keras")
            weights[name] = trained_weights(keras.models.load_model(path))
        keras.utils.set_random_seed(0)
        shape = language_model_network.Shape(**SIZES)
        initial = trained_weights(language_model_network.build_model(shape))
        for name in ("mirrored", "multi_worker"):
            with self.subTest(name):
                self.assertSameWeights(weights[name], weights["one"], initial)
        losses = {
            name: re.findall(r"loss: [0-9.]+", ended.output)
            for name, ended in results.items()
        }
        # One for each epoch, of all replicas, and one of held-out text.
        self.assertLen(losses["one"], 3)
        self.assertEqual(losses["mirrored"], losses["one"])
        self.assertEqual(losses["multi_worker"], losses["one"])
        lines = results["multi_worker"].output.splitlines()
        with self.subTest("Only the chief prints."):
            # TensorFlow may log there that the chief has ended before.
            printed = re.compile(r"\[1\] .*(loss:|Epoch|replica\(s\)|Accumul)")
            self.assertEmpty(list(filter(printed.match, lines)))
            self.assertRegex(
                results["multi_worker"].output,
                r"\[0\] .* 2 replica\(s\) with 2 rows each",
            )


class FaultTest(tf.test.TestCase):
    @unittest.skipIf(os.name == "nt", "Windows has no SIGKILL.")
    @pytest.mark.thorough
    def test_launcher_ends_all_when_a_worker_is_killed(self):
        folder = pathlib.Path(tempfile.mkdtemp(dir=TEMP_DIR))
        # It tells its number before it becomes the program.
        shell = ["sh", "-c", 'echo number $$; exec "$@"', "sh"]
        endless = program(strategy="multi_worker", epochs=100_000)
        process = worker_processes.start(launcher(*shell, *endless), folder)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        deadline = time.monotonic() + PLENTY
        output = ""
        while "Epoch 2/" not in output and time.monotonic() < deadline:
            self.assertIsNone(process.poll(), output)
            time.sleep(0.1)
            output = (folder / "output").read_text(encoding="utf-8")
        workers = dict(re.findall(r"\[(\d)\] number (\d+)\n", output))
        os.kill(int(workers["1"]), signal.SIGKILL)
        # What a shell says of such an end.
        self.assertEqual(process.wait(PLENTY), 128 + signal.SIGKILL)
        with self.assertRaises(ProcessLookupError):
            os.kill(int(workers["0"]), 0)

    @test_utils.at_night
    def test_says_why_it_cannot_start(self):
        addresses = launch_workers.free_addresses(4)
        first, second = launch_workers.environments(addresses[:2], None)
        _, taken = launch_workers.environments(addresses[2:], None)
        port = int(addresses[3].rpartition(":")[2])
        cases = {
            "misses a worker": (
                first,
                "1 of 2 workers did not listen within 1 seconds: "
                f"{addresses[1]}",
            ),
            "port in use": (taken, f"{addresses[3]}: Address already in use"),
            "wrong": (
                {"TF_CONFIG": second["TF_CONFIG"].replace('x": 1', 'x": 2')},
                "`index` in `task` of `TF_CONFIG` must be from 0 to 1",
            ),
        }
        command = program(strategy="multi_worker", startup_timeout=1)
        with socket.create_server(("", port)):
            results = finished(
                [command] * len(cases), [each for each, _ in cases.values()]
            )
        for (name, (_, message)), ended in zip(
            cases.items(), results, strict=True
        ):
            with self.subTest(name):
                self.assertEqual(ended.status, 1)
                self.assertIn(
                    "--strategy=multi_worker cannot be used.", ended.output
                )
                self.assertIn(message, ended.output)
                self.assertNotIn("Traceback", ended.output)


if __name__ == "__main__":
    tf.test.main()
