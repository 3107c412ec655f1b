"""What TensorFlow's allocator for the CPU has at hand for steps.

Where addresses are limited it is made to get all of it at once, before the
first step: see `Reserve`.
"""

import contextlib
import mmap
from collections.abc import Iterator

import tensorflow as tf

from keras_accum import compat
from keras_accum import counting
from keras_accum import heap
from keras_accum import system_memory

# What many tensors take of the allocator's regions, or of the C library, over
# what they are: there are gaps between them.
OVERSHOOT = 1.15
# What steps write to of its regions where they are not limited, over what is
# counted: tensors of other sizes leave gaps, and orders of work differ. By 1.15
# convolutions and a language model were killed.
GAPS = 1.4
# Bytes of a tensor that stands for a part of what a step needs.
TENSOR = 4 * 2**20
# One of these bytes of a region is for the allocator's books on it.
BOOKS = 32
# What other threads, which make the next batches ready, may take of the heap
# while there are no addresses.
HEAP = 32 * 2**20
# Addresses that others may take then, if the region does not.
SLACK = 16 * 2**20


class Reserve:
    """What TensorFlow's allocator for the CPU has at hand for steps.

    If it `keeps_regions`, each is twice as large as the one before. Where
    addresses are limited it would take nearly all that is left for one tensor,
    and leave nothing for anyone else. So it is made to ask for what a step will
    need when nobody else is at work, and cannot get much more.
    """

    def __init__(self) -> None:
        # Bytes of the largest tensor that it has been made to get, or gets with
        # the next step.
        self._largest = 0
        # Bytes of its regions, at least, if it was made to get many.
        self._regions = 0

    def for_many(self, free: int) -> int:
        """Returns what many tensors may need, to take no more than is free."""
        is_written = keeps_regions() and not is_limited()
        return int(free / (GAPS if is_written else OVERSHOOT))

    def at_hand(self) -> int:
        """Returns the bytes that are there for many tensors, and not free."""
        if is_limited():
            # Others may have taken of it since, such as buffers.
            idle = self._regions - counting.live_bytes("CPU:0")
            return max(0, int(idle / OVERSHOOT))
        if keeps_regions():
            # Addresses do not count, but what was written to stays.
            return counting.idle_bytes("CPU:0")
        # Not all tensors fit in between what is used.
        return int(heap.idle_bytes() / OVERSHOOT)

    def grow(self, needed: int, free: int) -> bool:
        """Gets what a step will need, and returns whether that much is free.

        Args:
            needed: Bytes of its tensors, all together.
            free: Bytes that may be used.
        """
        if needed > free:
            return False
        if is_limited() and needed > self.at_hand():
            # All at once, and the gaps: what there is, and what is added.
            count = -(-int(OVERSHOOT * needed) // TENSOR)
            live = counting.live_bytes("CPU:0")
            regions = live + count * TENSOR
            ask(count, TENSOR, regions - max(live, self._regions))
            self._regions = regions
        return True

    def taken(self, needed: int) -> int:
        """Returns how many bytes `grow_by_one` takes from what is free."""
        if needed <= self._largest:
            return 0
        if not is_limited():
            # What nobody writes to is not there.
            return needed
        region = region_for(needed)
        return region + region // BOOKS + TENSOR

    def grow_by_one(self, needed: int) -> None:
        """Gets a tensor of `needed` bytes, unless one as large was got."""
        if is_limited() and needed > self._largest:
            ask(1, needed, self.taken(needed))
        self._largest = max(self._largest, needed)


def ask(count: int, tensor: int, region: int) -> None:
    """Makes the allocator get up to `region` bytes, for tensors.

    Args:
        count: How many tensors there are to be at once.
        tensor: Bytes of each.
        region: Bytes.
    """
    # The books are made when the region is there, and addresses may be gone.
    with heap.kept(region // BOOKS + HEAP):
        limit, tensors = system_memory.address_limit(), []
        used = system_memory.address_space() + region + SLACK
        with ballast(limit - used), tf.device("CPU:0"):
            # Gaps that are too small for a tensor stay. To ask for one more
            # when all is got fails, and takes ten seconds.
            while len(tensors) < count and (
                limit - system_memory.address_space() >= 2 * TENSOR
            ):
                tensors.append(compat.uninitialized(tensor))
        del tensors


def is_limited() -> bool:
    """Returns whether addresses are limited, for an allocator with regions."""
    return system_memory.address_limit() is not None and keeps_regions()


def region_for(needed: int) -> int:
    """Returns the bytes of the region that is got for one tensor.

    TensorFlow's allocator asks for a power of two, and where it does not get
    that, for nine tenths, until it gets them.
    """
    region = 2 ** (needed - 1).bit_length()
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    if 2 * peak > region:
        # The regions before may have been as large, and the power is unknown.
        return int(needed / 0.9)
    while 0.9 * region >= needed:
        region = int(0.9 * region)
    return region


def keeps_regions() -> bool:
    """Returns whether TensorFlow's allocator for the CPU keeps what is freed.

    It does where TensorFlow uses oneDNN, and counts then as well.
    """
    return counting.counts_tensors("CPU:0")


@contextlib.contextmanager
def ballast(size: int) -> Iterator[None]:
    """Takes addresses, so that nobody else gets them within the context."""
    if size <= 0:
        yield
        return
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    # Linux refuses more than it has memory for, if it can be written to.
    with mmap.mmap(-1, size, flags, mmap.PROT_READ):
        yield
