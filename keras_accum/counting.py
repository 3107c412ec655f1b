"""What a call takes of a device's memory, counted while it runs.

TensorFlow counts its tensors on a GPU, and on a CPU where it uses oneDNN: its
allocator is then one that counts. Of other CPUs the system says how much memory
the process had at most. That is of more than tensors: a call should have been
made once before, for what it makes the first time.
"""

from collections.abc import Callable
from collections.abc import Iterable

import tensorflow as tf

from keras_accum import system_memory


def counted_bytes(function: Callable, *args, device: str = "CPU:0") -> int:
    """Returns the most memory that a call took, over what it found.

    It is 0 where nobody counts.

    Args:
        function: The function.
        *args: What it is called with.
        device: The device.
    """
    if counts_tensors(device):
        tf.config.experimental.reset_memory_stats(device)
        before = tf.config.experimental.get_memory_info(device)["current"]
        function(*args)
        return tf.config.experimental.get_memory_info(device)["peak"] - before
    if not counts(device):
        function(*args)
        return 0
    system_memory.forget_peak()
    before = system_memory.resident_bytes()
    function(*args)
    return max(0, system_memory.peak_bytes() - before)


def bytes_of(variables: Iterable) -> int:
    """Returns the bytes of variables of Keras's or TensorFlow's, by shape."""
    return sum(
        tf.TensorShape(each.shape).num_elements() * tf.as_dtype(each.dtype).size
        for each in variables
    )


def idle_bytes(device: str) -> int:
    """Returns the bytes that TensorFlow's allocator keeps for other tensors.

    It is what a call that was counted has taken and left. TensorFlow must count
    the device's tensors.
    """
    info = tf.config.experimental.get_memory_info(device)
    return info["peak"] - info["current"]


def live_bytes(device: str) -> int:
    """Returns the bytes of the tensors that there are; 0 if nobody counts."""
    if not counts_tensors(device):
        return 0
    return tf.config.experimental.get_memory_info(device)["current"]


def counts(device: str) -> bool:
    """Returns whether anybody counts the memory of a device."""
    if counts_tensors(device):
        return True
    return "CPU" in device and system_memory.tells_peaks()


def counts_tensors(device: str) -> bool:
    """Returns whether TensorFlow counts the tensors of a device."""
    try:
        tf.config.experimental.get_memory_info(device)
    except ValueError:
        return False
    return True
