"""Workers of a training: processes on this machine that run the same cases."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from examples import launch_workers

ROOT = pathlib.Path(__file__).absolute().parent.parent
# A guard against what never ends, however busy the machine is.
PLENTY = 900.0


def environment(**others):
    """Returns this process's environment, made to find the project."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return os.environ | {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Many processes share few cores.
        "TF_NUM_INTRAOP_THREADS": "1",
        **others,
    }


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    status: int
    output: str


def start(command, folder, **others):
    """Starts a process; what it writes goes to `folder / "output"`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output", "w", encoding="utf-8") as output:
        return subprocess.Popen(
            command,
            env=environment(**others),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(processes, folders, timeout=PLENTY):
    """Waits until all have ended, or kills them; returns an `Ended` of each.

    One that had to be killed has ended by SIGKILL.
    """
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline and any(
            process.poll() is None for process in processes
        ):
            time.sleep(0.02)
    finally:
        for process in processes:
            launch_workers.end(process)
            process.wait()
    return [
        Ended(
            process.returncode,
            (folder / "output").read_text(encoding="utf-8", errors="replace"),
        )
        for process, folder in zip(processes, folders, strict=True)
    ]


def run_cases(names, folder, workers, replicas=1, **others):
    """Runs cases of `tests/worker_cases.py` in workers of their own.

    Args:
        names: The cases, run one after the other.
        folder: A folder that all workers see, for all that they write.
        workers: How many processes.
        replicas: How many devices each of them splits its CPU into.
        **others: What the workers' environments have beside this one's.

    Returns:
        An `Ended` for each worker.
    """
    addresses = launch_workers.free_addresses(workers)
    processes, folders = [], []
    for index, env in enumerate(launch_workers.environments(addresses, None)):
        folders.append(folder / f"worker-{index}")
        command = [sys.executable, "-m", "tests.worker_cases"]
        arguments = [str(folder), str(replicas), *names]
        processes.append(
            start(command + arguments, folders[-1], **env, **others)
        )
    return wait_for(processes, folders)


def results(folder, workers, name):
    """Returns what each worker's case `name` returned."""
    return [
        load(folder / f"worker-{index}" / f"{name}.npz")
        for index in range(workers)
    ]


def load(path):
    """Returns the arrays of a file that `save` wrote."""
    with np.load(path) as arrays:
        return dict(arrays)


def save(path, arrays):
    """Saves a dict of what can be made arrays."""
    np.savez(path, **arrays)


def task():
    """Returns the index of this process's worker, and how many there are."""
    config = json.loads(os.environ["TF_CONFIG"])
    return config["task"]["index"], len(config["cluster"]["worker"])
