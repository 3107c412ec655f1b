"""The launcher of local workers, with commands that have no need of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import tensorflow as tf
from absl.testing import parameterized

from examples import launch_workers

ROOT = pathlib.Path(__file__).absolute().parent.parent

# A guard against what never ends, however busy the machine is.
PLENTY = 600.0
# Ends when it is asked to, after a line of output; and what does not. By itself
# it would outlast the guard.
WAIT = f"print('ready', flush=True); import time; time.sleep({10 * PLENTY})"
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAIT


def start(program, *arguments):
    """Starts the launcher, as a user would, with a Python program to run."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "examples.launch_workers",
            *arguments,
            "--",
            sys.executable,
            "-c",
            program,
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(program, *arguments):
    """Returns the launcher's status, output and errors."""
    with start(program, *arguments) as launcher:
        out, err = launcher.communicate(timeout=PLENTY)
    return launcher.returncode, out, err


def rank(then):
    """Returns a program that runs `then[rank]` in the worker of that rank."""
    return (
        "import json, os;"
        "exec(json.loads(os.environ['TEST_PROGRAMS'])"
        "[json.loads(os.environ['TF_CONFIG'])['task']['index']])"
    ), {"TEST_PROGRAMS": json.dumps(then)}


def is_running(pid):
    """Returns whether there is such a process, and it is no zombie."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


class ClusterTest(tf.test.TestCase):
    def test_gives_each_worker_its_task(self):
        program = "import os; print(os.environ['TF_CONFIG'])"
        status, out, err = finished(program, "--workers=3")
        self.assertEqual((status, err), (0, ""))
        configs = {}
        for line in out.splitlines():
            prefix, _, text = line.partition(" ")
            configs[prefix] = json.loads(text)
        self.assertEqual(sorted(configs), ["[0]", "[1]", "[2]"])
        addresses = configs["[0]"]["cluster"]["worker"]
        self.assertLen(set(addresses), 3)
        for index in range(3):
            self.assertEqual(
                configs[f"[{index}]"],
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                },
            )


class StatusTest(tf.test.TestCase, parameterized.TestCase):
    def run_ranks(self, programs, grace=PLENTY):
        program, environment = rank(programs)
        with mock.patch.dict(os.environ, environment):
            return finished(program, f"--grace={grace}")

    @parameterized.parameters(
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 128 + 11),
    )
    def test_is_that_of_the_worker_that_failed(self, failing, expected):
        if os.name == "nt" and expected > 128:
            self.skipTest("Windows does not end programs by signals.")
        # The other one is ended, or the launcher would wait for it.
        status, out, _ = self.run_ranks([WAIT, failing])
        self.assertEqual(status, expected)

    def test_shows_what_the_failed_worker_said(self):
        _, out, _ = self.run_ranks([WAIT, "raise ValueError('no such luck')"])
        self.assertIn("[1] ValueError: no such luck\n", out)

    def test_kills_a_worker_that_does_not_end(self):
        failing = "import time; time.sleep(1); raise SystemExit(3)"
        status, _, _ = self.run_ranks([IGNORE, failing], grace=0.5)
        self.assertEqual(status, 3)


@unittest.skipIf(os.name == "nt", "Windows passes no signals on.")
class SignalTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (signal.SIGTERM, WAIT), (signal.SIGINT, WAIT), (signal.SIGTERM, IGNORE)
    )
    def test_ends_all_workers_and_what_they_started(
        self, signal_number, program
    ):
        # Each worker starts another process, in its group.
        parent = (
            "import os, subprocess, sys;"
            f"child = subprocess.Popen([sys.executable, '-c', {program!r}]);"
            "print(os.getpid(), child.pid, flush=True);"
            f"{program}"
        )
        with start(parent, "--grace=0.5") as launcher:
            lines = [launcher.stdout.readline() for _ in range(6)]
            pids = [
                int(word)
                for line in lines
                for word in line.split()[1:]
                if word.isdecimal()
            ]
            launcher.send_signal(signal_number)
            launcher.communicate(timeout=PLENTY)
        self.assertLen(pids, 4)
        self.assertEqual(launcher.returncode, 128 + signal_number)
        deadline = time.monotonic() + PLENTY
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEmpty([pid for pid in pids if is_running(pid)])


class GpusTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ([], 2, 1, None),
        (["0", "1", "2"], 2, 1, ["0", "1"]),
        (["3", "5", "6", "7"], 2, 2, ["3,5", "6,7"]),
    )
    def test_are_divided(self, gpus, workers, each, expected):
        self.assertEqual(launch_workers.shares(gpus, workers, each), expected)

    @parameterized.parameters(([], 1, 2), (["0"], 2, 1), (["0", "1"], 2, 2))
    def test_must_be_enough(self, gpus, workers, each):
        with self.assertRaisesRegex(
            ValueError, f"{workers} times {each} with {len(gpus)} GPU"
        ):
            launch_workers.shares(gpus, workers, each)

    def test_are_those_that_a_program_would_see(self):
        visible = {"CUDA_VISIBLE_DEVICES": "2,3"}
        with mock.patch.dict(os.environ, visible):
            self.assertEqual(launch_workers.visible_gpus(), ["2", "3"])


class ErrorsTest(tf.test.TestCase):
    def test_says_that_the_command_is_missing(self):
        with self.assertRaisesRegex(SystemExit, "after --"):
            launch_workers.main(["launch_workers"])

    def test_says_that_there_is_no_such_command(self):
        with self.assertRaises(FileNotFoundError):
            launch_workers.launch(["/no/such/program"], [{}, {}], grace=0)


if __name__ == "__main__":
    tf.test.main()
