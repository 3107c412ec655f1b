"""What the system says of a CPU's memory."""

import contextlib
import ctypes
import functools
import mmap
import pathlib

# What is free where the system says nothing of it: more than there ever is.
UNKNOWN = 2**62
# To write 5 to it makes the most memory so far what there is now.
CLEAR = pathlib.Path("/proc/self/clear_refs")
STATUS = pathlib.Path("/proc/self/status")
# Of a thread, where stacks are not limited, by glibc on 64-bit x86.
DEFAULT_STACK = 2 * 2**20
# Of glibc's `malloc.h`.
M_ARENA_MAX = -8


def free_bytes() -> int:
    """Returns the bytes that this process may allocate, as the system says.

    Linux says all of it. Elsewhere it is `UNKNOWN`: nothing is forecast then,
    and what TensorFlow's allocator says counts, as on a GPU.
    """
    free = [UNKNOWN]
    limit = address_limit()
    if limit is not None:
        free.append(limit - address_space())
    for room in room_of_machine, room_of_group:
        try:
            free.append(room())
        except (OSError, ValueError, IndexError):
            # Another system, or no limit.
            continue
    return min(free)


def address_limit() -> int | None:
    """Returns the most bytes of address space for the process, if limited."""
    try:
        # Windows has neither the module nor such a limit.
        import resource
    except ModuleNotFoundError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    # macOS takes a limit, but does not hold to it, nor say what is used of it.
    if limit == resource.RLIM_INFINITY or not address_space():
        return None
    return limit


def make_no_more_heaps() -> None:
    """Makes the C library give new threads heaps that it has already.

    Each heap takes 64 MiB of addresses, if there are so many, and a thread that
    starts after that gets none for its stack, which ends the process. With
    fewer heaps, threads wait for each other; tensors are not from heaps.
    """
    # glibc's; others have one heap for all threads, or small ones.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def room_of_machine() -> int:
    """Returns the bytes that Linux says are available without swapping."""
    meminfo = read_kernel(pathlib.Path("/proc/meminfo"))
    return 1024 * number_after("MemAvailable:", meminfo)


def room_of_group(folder: str = "/sys/fs/cgroup") -> int:
    """Returns the rest of a container's limit, or raises if there is none.

    Args:
        folder: Of the control group. What it has in memory of files that were
            read counts as used there, and can be had again.
    """
    group = pathlib.Path(folder)
    limit = int(read_kernel(group / "memory.max"))
    used = int(read_kernel(group / "memory.current"))
    statistics = read_kernel(group / "memory.stat")
    return limit - used + number_after("inactive_file", statistics)


def read_kernel(file: pathlib.Path) -> str:
    """Reads a file of Linux's kernel, or raises `OSError` on other systems."""
    return file.read_text(encoding="utf-8")


def number_after(name: str, text: str) -> int:
    """Returns the number behind a name, in a file of the kernel's."""
    return int(text.partition(name)[2].split()[0])


def address_space() -> int:
    """Returns the bytes of this process's address space; 0 if not known."""
    try:
        pages = read_kernel(pathlib.Path("/proc/self/statm")).split()[0]
        return int(pages) * mmap.PAGESIZE
    except OSError:
        return 0


def stack_space() -> int:
    """Returns what of it the stacks of all threads take, as far as known."""
    try:
        import resource

        threads = number_after("Threads:", read_kernel(STATUS))
    except (OSError, ModuleNotFoundError):
        return 0
    size, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return threads * (DEFAULT_STACK if size == resource.RLIM_INFINITY else size)


@functools.cache
def tells_peaks() -> bool:
    """Returns whether it says the most memory that the process had.

    Linux does, unless a container keeps it from that.
    """
    try:
        forget_peak()
        return peak_bytes() > 0
    except (OSError, AttributeError, TypeError, IndexError, ValueError):
        return False


def forget_peak() -> None:
    """Makes the most memory that the process had what it has now.

    What is free goes back to the system first, so that to take it again counts.
    """
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5", encoding="ascii")


def resident_bytes() -> int:
    """Returns the bytes of memory that this process has."""
    return 1024 * number_after("VmRSS:", read_kernel(STATUS))


def peak_bytes() -> int:
    """Returns the most that it had since `forget_peak`."""
    return 1024 * number_after("VmHWM:", read_kernel(STATUS))
