"""Quiet while a library is imported that talks at length."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Hides what anything in this process writes to the standard error.

    Libraries in other languages write past `sys.stderr`, so it is the file
    itself that goes elsewhere meanwhile.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
