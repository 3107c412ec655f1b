"""The workers of a training on several machines: who they are, and waiting.

TensorFlow believes what `TF_CONFIG` says, and then waits for the other workers,
for an hour and deaf to signals. So what it says is checked first, and every
worker sees that all of them listen before TensorFlow is asked to meet them.
"""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Sequence

import tensorflow as tf

# The first of these jobs that there is has the chief as its task 0.
_JOBS = ("chief", "worker")
_SECONDS_BETWEEN_TRIES = 0.2

ClusterResolver = tf.distribute.cluster_resolver.ClusterResolver


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process, among all workers.

    Args:
        addresses: All workers' `host:port`, the chief's first.
        rank: Which of them is this one's.
    """

    addresses: tuple[str, ...]
    rank: int

    @property
    def is_chief(self) -> bool:
        """Whether this worker prints, logs and saves for all."""
        return self.rank == 0


def check_tf_config(text: str | None) -> None:
    """Raises a `ValueError` that names what is wrong with a `TF_CONFIG`."""
    if not text:
        raise ValueError(
            "`TF_CONFIG` must be set in the environment of every worker. "
            "`python -m examples.launch_workers` sets it for local ones"
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`TF_CONFIG` must be JSON ({error})") from None
    for key in ("cluster", "task"):
        if not isinstance(config, dict) or not isinstance(
            config.get(key), dict
        ):
            raise ValueError(f"`TF_CONFIG` must have an object `{key}`")
    _check_jobs(config["cluster"])
    _check_task(config["cluster"], config["task"])


def _check_jobs(jobs):
    unknown = set(jobs) - set(_JOBS)
    if unknown or not jobs:
        raise ValueError(
            "`cluster` of `TF_CONFIG` must have the jobs `worker` or `chief`, "
            f"and no others. Received: {sorted(jobs)}"
        )
    for job, addresses in jobs.items():
        if not isinstance(addresses, list) or not addresses:
            raise ValueError(
                f"`{job}` in `cluster` of `TF_CONFIG` must be a list of "
                f"addresses. Received: {addresses}"
            )
        for address in addresses:
            host_and_port(address)
    if len(jobs.get("chief", ["one"])) != 1:
        raise ValueError("`chief` in `cluster` of `TF_CONFIG` must be one")
    everyone = [address for job in jobs.values() for address in job]
    if len(set(everyone)) < len(everyone):
        raise ValueError(
            "The addresses in `cluster` of `TF_CONFIG` must differ. "
            f"Received: {everyone}"
        )


def _check_task(jobs, task):
    job, index = task.get("type"), task.get("index")
    if job not in jobs:
        raise ValueError(
            "`type` in `task` of `TF_CONFIG` must be a job of `cluster`, one "
            f"of {sorted(jobs)}. Received: {job!r}"
        )
    # Python takes True for 1; TensorFlow takes "1" for it, as do we.
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool):
        raise ValueError(
            "`index` in `task` of `TF_CONFIG` must be an integer. "
            f"Received: {index!r}"
        )
    if not 0 <= index < len(jobs[job]):
        raise ValueError(
            f"`index` in `task` of `TF_CONFIG` must be from 0 to "
            f"{len(jobs[job]) - 1}, since `{job}` has {len(jobs[job])} "
            f"address(es). Received: {index}"
        )


def host_and_port(address: str) -> tuple[str, int]:
    """Splits `host:port`, where the host may be an IPv6 one in brackets."""
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            "An address in `TF_CONFIG` must be host:port, with a port from 1 "
            f"to 65535. Received: {address!r}"
        )
    return host.strip("[]"), int(port)


def resolve(name: str) -> ClusterResolver:
    """Returns what knows the cluster, from `TF_CONFIG` or from SLURM.

    Args:
        name: `"tf_config"` or `"slurm"`.

    Raises:
        ValueError: If the environment does not say, or says nonsense.
    """
    if name == "tf_config":
        check_tf_config(os.environ.get("TF_CONFIG"))
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        return _resolve_slurm()
    except RuntimeError as error:  # A variable is missing.
        raise ValueError(f"SLURM does not describe this job: {error}") from None


def _resolve_slurm():
    # TensorFlow's resolver hands out one address per share of a node's GPUs: it
    # fails where there are none, and cannot choose them once TensorFlow has
    # looked. It is told of one per task and asked for the addresses alone; the
    # GPUs are those that SLURM lets this task see (`srun --gpus-per-task`).
    slurm = tf.distribute.cluster_resolver.SlurmClusterResolver(
        gpus_per_node=int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)),
        gpus_per_task=1,
        auto_set_gpu=False,
    )
    spec = slurm.cluster_spec()
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec,
        task_type=slurm.task_type,
        task_id=slurm.task_id,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )


def worker_of(resolver: ClusterResolver) -> Worker:
    """Returns this process's place among the workers."""
    jobs = resolver.cluster_spec().as_dict()
    tasks = [(job, i) for job in _JOBS for i in range(len(jobs.get(job, [])))]
    return Worker(
        addresses=tuple(jobs[job][i] for job, i in tasks),
        rank=tasks.index((resolver.task_type, resolver.task_id)),
    )


def wait_for_workers(worker: Worker, timeout: float) -> None:
    """Returns when every worker listens at its address.

    This one listens meanwhile, without answering: being connected is enough.

    Args:
        worker: This process.
        timeout: Seconds after which to give up.

    Raises:
        TimeoutError: If some worker does not listen by then.
        OSError: If this worker cannot listen, as when its port is in use.
    """
    deadline = time.monotonic() + timeout
    missing = [
        a for a in worker.addresses if a != worker.addresses[worker.rank]
    ]
    with _listen(worker):
        while missing := [a for a in missing if not _listens(a)]:
            if time.monotonic() > deadline:
                raise TimeoutError(_report(worker, missing, timeout))
            time.sleep(_SECONDS_BETWEEN_TRIES)


def _listen(worker):
    address = worker.addresses[worker.rank]
    _, port = host_and_port(address)
    # At all interfaces, as TensorFlow will: a host's name may be one that only
    # the other workers can use.
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=len(worker.addresses),
        )
    except OSError as error:
        raise OSError(
            f"This worker cannot listen at its address {address}: "
            f"{error.strerror}"
        ) from None


def _listens(address):
    try:
        socket.create_connection(host_and_port(address), timeout=1).close()
    except OSError:
        return False
    return True


def _report(worker: Worker, missing: Sequence[str], timeout: float) -> str:
    return (
        f"{len(missing)} of {len(worker.addresses)} workers did not listen "
        f"within {timeout:g} seconds: {', '.join(missing)}. This one is "
        f"{worker.addresses[worker.rank]}"
    )
