"""Where a training runs: the distribution strategies of TensorFlow, by name."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator

import tensorflow as tf

from examples import cluster

NAMES = ("one", "mirrored", "multi_worker", "tpu")

_DEFAULT_REPLICAS = 2


def one_device() -> tf.distribute.Strategy:
    """Returns TensorFlow's default strategy: the first GPU, or the CPU."""
    return tf.distribute.get_strategy()


def mirrored(replicas: int | None = None) -> tf.distribute.Strategy:
    """Returns a strategy of replicas on one machine.

    Args:
        replicas: How many of its GPUs; None for all of them. Without a GPU the
            CPU is split into this many devices; None for two. That makes
            nothing faster, and shows that it works.

    Raises:
        ValueError: If there are fewer GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        replicas = replicas or len(gpus)
        if replicas > len(gpus):
            raise ValueError(
                f"There are {len(gpus)} GPUs for {replicas} replicas"
            )
        return tf.distribute.MirroredStrategy(
            [f"GPU:{i}" for i in range(replicas)]
        )
    replicas = replicas or _DEFAULT_REPLICAS
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def multi_worker(
    cluster_resolver: str = "tf_config", startup_timeout: float = 300
) -> tf.distribute.Strategy:
    """Returns a strategy over several machines: all GPUs of each, or its CPU.

    When a worker is lost later, TensorFlow misses its heartbeats for some ten
    seconds, and then ends what waits for it with an `UnavailableError` in all
    others. They have to be started again, and go on from what was saved.

    Args:
        cluster_resolver: `"tf_config"` or `"slurm"`: who knows the workers.
        startup_timeout: Seconds that the workers have to come together.

    Raises:
        ValueError: If the environment does not describe a cluster.
        OSError: If this worker's port is in use, or others do not come.
    """
    resolver = cluster.resolve(cluster_resolver)
    cluster.wait_for_workers(cluster.worker_of(resolver), startup_timeout)
    with _ending_the_process_after(startup_timeout):
        return tf.distribute.MultiWorkerMirroredStrategy(resolver)


@contextlib.contextmanager
def _ending_the_process_after(seconds: float) -> Iterator[None]:
    """Ends the process, with a traceback, if the block takes longer.

    TensorFlow waits for workers with the interpreter's lock held: no other
    Python thread can stop it, nor can a signal that Python handles.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def tpu(address: str = "local") -> tf.distribute.Strategy:
    """Returns a strategy over the cores of a TPU.

    Args:
        address: `"local"` on a TPU VM, else the TPU's name or address.

    Raises:
        ValueError: If there is no such TPU.
    """
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(
            address
        )
    # Errors of TensorFlow, of Google's metadata server and of the network.
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"There is no TPU at `{address}` ({reason})") from None
    return tf.distribute.TPUStrategy(resolver)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process prints, logs and saves."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    return cluster.worker_of(strategy.cluster_resolver).is_chief
