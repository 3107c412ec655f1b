"""What the system says of a CPU's memory."""

import contextlib
import ctypes
import functools
import mmap
import pathlib
from collections.abc import Iterator

# What is free where the system says nothing of it: more than there ever is.
UNKNOWN = 2**62
# To write 5 to it makes the most memory so far what there is now.
CLEAR = pathlib.Path("/proc/self/clear_refs")
STATUS = pathlib.Path("/proc/self/status")
# By the type of a control group's file system, what says its limit, what it
# uses, and what names in `memory.stat` begin with that count its parts as well.
GROUPS = {
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    "cgroup2": ("memory.max", "memory.current", ""),
}
# Of a thread, where stacks are not limited, by glibc on 64-bit x86.
DEFAULT_STACK = 2 * 2**20


def free_bytes() -> int:
    """Returns the bytes that this process may allocate, as the system says.

    Linux says all of it. Elsewhere it is `UNKNOWN`: nothing is forecast then,
    and what TensorFlow's allocator says counts, as on a GPU.
    """
    free = [UNKNOWN]
    limit = address_limit()
    if limit is not None:
        free.append(limit - address_space())
    for room in room_of_machine, room_of_groups:
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


def room_of_machine() -> int:
    """Returns the bytes that Linux says are available without swapping."""
    meminfo = read_kernel(pathlib.Path("/proc/meminfo"))
    return 1024 * number_after("MemAvailable:", meminfo)


def room_of_groups(process: str = "/proc/self") -> int:
    """Returns the rest of what a process's control groups may have.

    Containers, batch systems and systemd limit memory by these. A group's
    parents limit it as well. What it has in memory of files counts as used
    there, and can be had: all of what was read and is not used, and half of
    what is used, such as code. With less the process would read all the time.

    Args:
        process: The folder that says which groups are the process's.

    Raises:
        ValueError: If nothing is limited.
        OSError: On other systems.
    """
    rooms = []
    for kind, folder in groups(pathlib.Path(process)):
        limit, used, prefix = GROUPS[kind]
        # What has no limit has no such file, or says "max" in it.
        with contextlib.suppress(OSError, ValueError, KeyError):
            lines = read_kernel(folder / "memory.stat").splitlines()
            parts = dict(map(str.split, lines))
            rooms.append(
                int(read_kernel(folder / limit))
                - int(read_kernel(folder / used))
                + int(parts[f"{prefix}inactive_file"])
                + int(parts[f"{prefix}active_file"]) // 2
            )
    return min(rooms)


def groups(process: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields the folders of a process's groups and of their parents.

    Both kinds may be there, of which one limits memory. See cgroups(7) and, of
    what is mounted where, proc_pid_mountinfo(5).

    Args:
        process: The folder that says which groups are the process's.
    """
    paths = {}
    for line in read_kernel(process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in read_kernel(process / "mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind == "cgroup" and "memory" not in options.split(","):
            continue
        if kind in paths:
            root, top = map(pathlib.PurePosixPath, mount.split(" ")[3:5])
            group = pathlib.PurePosixPath(paths[kind])
            # A container may see its own group alone, as if it were all.
            inside = group.relative_to(root) if root in group.parents else "."
            folder = pathlib.Path(top, inside)
            for each in (folder, *folder.parents):
                yield kind, each
                if each == pathlib.Path(top):
                    break


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


def anonymous_bytes() -> int:
    """Returns what of it is not of files."""
    return 1024 * number_after("RssAnon:", read_kernel(STATUS))


def peak_bytes() -> int:
    """Returns the most that it had since `forget_peak`."""
    return 1024 * number_after("VmHWM:", read_kernel(STATUS))
