r"""Starts the workers of a training on this machine, as a cluster would.

    python -m examples.launch_workers --workers=2 -- \
        python -m examples.language_model --strategy=multi_worker

Each worker is a process that runs the command after `--`, with a `TF_CONFIG` of
its own: addresses on the loopback interface, at free ports. Their output is
shown line by line, after the worker's number. If one fails, all others are
ended, and the status is that of the failed one; a signal is passed on to all.
On Windows, which has no signals to pass on, workers are ended at once.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence

from absl import app
from absl import flags

FLAGS = flags.FLAGS

flags.DEFINE_integer("workers", 2, "Processes to start.", lower_bound=1)
flags.DEFINE_integer(
    "replicas_per_worker",
    1,
    "GPUs that each worker has for its own. Without a GPU it is 1, the CPU,"
    " which all workers share.",
    lower_bound=1,
)
flags.DEFINE_float(
    "grace",
    10.0,
    "Seconds that workers have to end before they are killed. TensorFlow ends"
    " at once, or not at all, while it waits for a worker.",
    lower_bound=0.0,
)

_SECONDS_BETWEEN_LOOKS = 0.05
# The signals of these that this system has.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]
# What Python writes to a pipe differs between systems, unless it is told.
_UTF8 = {"PYTHONIOENCODING": "utf-8"}


def free_addresses(count: int) -> list[str]:
    """Returns addresses on the loopback interface that nothing listens at."""
    with contextlib.ExitStack() as stack:
        # All are open at once, so that no port comes twice.
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for _ in range(count)
        ]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def visible_gpus() -> list[str]:
    """Returns the GPUs that a program started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    found = pathlib.Path("/dev").glob("nvidia[0-9]*")
    return [str(i) for i in range(len(list(found)))]


def shares(gpus: Sequence[str], workers: int, each: int) -> list[str] | None:
    """Divides GPUs among the workers.

    Args:
        gpus: The GPUs that there are.
        workers: The number of workers.
        each: GPUs per worker.

    Returns:
        A `CUDA_VISIBLE_DEVICES` for each worker, or None without GPUs.

    Raises:
        ValueError: If there are not as many.
    """
    if not gpus and each == 1:
        return None
    if workers * each > len(gpus):
        raise ValueError(
            "`--workers` times `--replicas_per_worker` must be at most the"
            f" number of GPUs. Received: {workers} times {each} with"
            f" {len(gpus)} GPU(s). With CUDA_VISIBLE_DEVICES= in the"
            " environment and one replica each, they share the CPU"
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(workers)]


def environments(
    addresses: Sequence[str], gpus: Sequence[str] | None
) -> Iterator[dict[str, str]]:
    """Yields what each worker's environment has beside this one's."""
    for index in range(len(addresses)):
        config = {
            "cluster": {"worker": list(addresses)},
            "task": {"type": "worker", "index": index},
        }
        environment = {"TF_CONFIG": json.dumps(config)}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index]
        yield environment


def _show(worker, index):
    for line in worker.stdout:
        # One call, so that lines of two workers do not mix.
        sys.stdout.write(f"[{index}] {line.rstrip()}\n")
        sys.stdout.flush()


def end(worker: subprocess.Popen, signal_number: int | None = None) -> None:
    """Ends a process that leads a session, and what it has started.

    Args:
        worker: The process, which may have ended.
        signal_number: The signal to send; None stands for the one that no
            process can ignore.
    """
    if not hasattr(os, "killpg"):
        # Windows has no groups, and this one way to end a process.
        worker.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(
            worker.pid,
            signal.SIGKILL if signal_number is None else signal_number,
        )


def _end_all(workers, signal_number=None):
    for worker in workers:
        end(worker, signal_number)


def _wait(workers, received, grace):
    """Returns the status that the launcher ends with."""
    status, deadline = 0, None
    while any(worker.poll() is None for worker in workers):
        failed = [worker for worker in workers if worker.poll()]
        if deadline is None and (failed or received):
            status = 128 + received[0] if received else failed[0].returncode
            deadline = time.monotonic() + grace
            _end_all(workers, received[0] if received else signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _end_all(workers)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if not status:
        status = next((w.returncode for w in workers if w.returncode), 0)
    # What a shell says of a process that a signal has ended.
    return 128 - status if status < 0 else status


def launch(
    command: Sequence[str],
    worker_environments: Sequence[dict[str, str]],
    grace: float,
) -> int:
    """Runs a command once per worker.

    Args:
        command: The program and its arguments.
        worker_environments: What each worker's environment has beside this
            one's.
        grace: Seconds that workers have to end when they must.

    Returns:
        0 if all succeed, else the status of the first that failed, or 128 and
        the signal that ended it.
    """
    received, workers, threads = [], [], []
    previous = {
        signal_number: signal.signal(
            signal_number, lambda n, _: received.append(n)
        )
        for signal_number in _SIGNALS
    }
    try:
        for index, environment in enumerate(worker_environments):
            worker = subprocess.Popen(
                command,
                env=os.environ | _UTF8 | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            workers.append(worker)
            thread = threading.Thread(target=_show, args=(worker, index))
            thread.start()
            threads.append(thread)
        return _wait(workers, received, grace)
    finally:
        _end_all(workers)
        for worker, thread in zip(workers, threads, strict=True):
            worker.wait()
            thread.join()
            worker.stdout.close()
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def main(argv: list[str]) -> int:
    """Starts the workers, and returns when all have ended."""
    command = argv[1:]
    if not command:
        sys.exit(
            "The command that the workers run is missing: give it after --"
        )
    try:
        gpus = shares(visible_gpus(), FLAGS.workers, FLAGS.replicas_per_worker)
    except ValueError as error:
        sys.exit(f"{error}.")
    addresses = free_addresses(FLAGS.workers)
    try:
        return launch(command, list(environments(addresses, gpus)), FLAGS.grace)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}.")


if __name__ == "__main__":
    # Workers may write characters that the terminal here does not have.
    sys.stdout.reconfigure(errors="replace")
    app.run(main)
