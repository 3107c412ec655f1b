"""Attributes and methods of others, replaced for a while."""

import contextlib
import threading


@contextlib.contextmanager
def attribute(owner, name, value):
    """Gives an object another attribute for a while."""
    missing = object()
    before = vars(owner).get(name, missing)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)


class Hook:
    """A function of others that calls one of ours, in threads that ask for it.

    Args:
        owner: The class or module.
        name: Name of its method or function.
    """

    def __init__(self, owner, name):
        self._owner, self._name = owner, name
        self._method = getattr(owner, name)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._users = 0

    @contextlib.contextmanager
    def calling(self, function):
        """Has this thread call `function(method, owner, *args)` for a while."""
        before = getattr(self._local, "function", None)
        self._count_users(1)
        self._local.function = function
        try:
            yield
        finally:
            self._local.function = before
            self._count_users(-1)

    def _count_users(self, change):
        """Replaces the method while anyone uses it, in whatever thread."""

        def replaced(*args, **kwargs):
            function = getattr(self._local, "function", None)
            if function is None:
                return self._method(*args, **kwargs)
            return function(self._method, *args, **kwargs)

        with self._lock:
            self._users += change
            method = replaced if self._users else self._method
            setattr(self._owner, self._name, method)
