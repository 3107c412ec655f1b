"""The C library's heap: its options, and what it has.

What is set and asked here is glibc's. Other C libraries have one heap for all
threads, or small ones: there, nothing is done, and nothing is known.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

from keras_accum import system_memory

# Of glibc's `malloc.h`.
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
# Bytes from which on blocks are not of the heap: the most that can be set, and
# what there is when a process begins.
LARGEST_THRESHOLD = 32 * 2**20
THRESHOLD = 128 * 2**10
# Bytes of a block that stands for a part of what is to be kept.
BLOCK = 4 * 2**20


class HeapStatistics(ctypes.Structure):
    """What glibc's `mallinfo2` returns; see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def set_option(option: int, value: int) -> None:
    """Sets an option of the heap, where it has such options."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(option, value)


def share() -> None:
    """Makes new threads share heaps that there are, if addresses are limited.

    A heap takes 64 MiB of addresses, if there are so many, and a thread that
    starts after that gets none for its stack, which ends the process. With
    fewer heaps, threads wait for each other; tensors are not from heaps. Once
    there are some, the C library has its own limit for more.
    """
    if system_memory.address_limit() is not None:
        set_option(M_ARENA_MAX, 1)


def idle_bytes() -> int:
    """Returns the bytes that the heap has for who asks, and are not free.

    Where addresses are not limited, it gives them back first, as far as it can.
    It is 0 where it does not say: glibc does, from 2.33 on.
    """
    library = ctypes.CDLL(None)
    try:
        if system_memory.address_limit() is None:
            library.malloc_trim(0)
            return 0
        library.mallinfo2.restype = HeapStatistics
    except AttributeError:
        return 0
    return library.mallinfo2().fordblks


@contextlib.contextmanager
def kept(size: int) -> Iterator[None]:
    """Makes the heap keep `size` bytes in one block, for who asks next."""
    with large_blocks():
        blocks, in_a_row = [bytearray(BLOCK)], 0
        # Some may go into gaps, which compilations leave.
        for _ in range(-(-(size + idle_bytes()) // BLOCK)):
            if in_a_row >= size:
                break
            blocks.append(bytearray(BLOCK))
            distance = address_of(blocks[-1]) - address_of(blocks[-2])
            is_next = BLOCK <= distance < BLOCK + mmap.PAGESIZE
            in_a_row = (in_a_row if is_next else 0) + BLOCK
        # The heap does not shrink as long as there is something at its end.
        end = bytearray(BLOCK)
    del blocks
    yield
    del end


@contextlib.contextmanager
def large_blocks() -> Iterator[None]:
    """Makes the C library take large blocks from its heap as well.

    Others are mapped one by one, and given back to the system when freed. From
    the first data set of a generator on, TensorFlow has that done with all of
    `THRESHOLD` and more. After the context it is so in any case.
    """
    set_option(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    try:
        yield
    finally:
        set_option(M_MMAP_THRESHOLD, THRESHOLD)


def address_of(block: bytearray) -> int:
    """Returns where the bytes of a block begin."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block))
