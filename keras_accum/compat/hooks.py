"""Attributes and methods of others, replaced within a context."""

import contextlib
import threading
import weakref

from keras_accum.compat import names

# Stands for a method that a class has from another one.
_INHERITED = object()


@contextlib.contextmanager
def attribute(owner, name, value):
    """Sets an attribute of an object, and resets it at the end."""
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

    It is wrapped only while somebody asks. What is there at that time is
    wrapped, so that a patch of another library is called as well. It may also
    come, or go, in the meantime:

    ```python
    with hook.calling(function):  # cls.method = wrapper(cls.method)
        cls.method = patch(cls.method)  # Somebody else's.
    # Stays: patch(wrapper(...)), and the wrapper passes on what it gets.
    ```

    Args:
        owner: The class or module.
        name: Name of its method or function.

    Raises:
        ImportError: If the owner has no such name in this release.
    """

    def __init__(self, owner, name):
        if not hasattr(owner, name):
            # Of a class; a module has its full name.
            module = getattr(owner, "__module__", "")
            path = f"{module}.{owner.__name__}.{name}".lstrip(".")
            raise ImportError(names.absence(path))
        self._owner, self._name = owner, name
        self._local = threading.local()
        # What is called where a thread asks for nothing.
        self._shared = None
        self._lock = threading.Lock()
        self._users = 0
        # The wrappers that somebody still has, each with what was there before.
        self._before = weakref.WeakKeyDictionary()
        self._wrapper = None

    @contextlib.contextmanager
    def calling_everywhere(self, function):
        """As `calling`, in all threads, such as those of replicas."""
        before, self._shared = self._shared, function
        self._enter()
        try:
            yield
        finally:
            self._shared = before
            self._leave()

    @contextlib.contextmanager
    def calling(self, function):
        """Calls `function(method, owner, *args)` instead, in this thread."""
        before = getattr(self._local, "function", None)
        self._enter()
        self._local.function = function
        try:
            yield
        finally:
            self._local.function = before
            self._leave()

    def calling_before(self, function):
        """Calls `function(owner, *args)`, and then what is called without it.

        In this thread, as `calling`.
        """
        inner = getattr(self._local, "function", None)

        def both(method, *args, **kwargs):
            function(*args, **kwargs)
            if inner is None:
                return method(*args, **kwargs)
            return inner(method, *args, **kwargs)

        return self.calling(both)

    def _enter(self):
        """Wraps what is there for the first user, in whatever thread."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            current = self._current()
            if current in self._before:
                # Left behind under a patch that has gone.
                self._wrapper = current
                return
            self._wrapper = self._wrapped(current)
            self._before[self._wrapper] = current
            setattr(self._owner, self._name, self._wrapper)

    def _leave(self):
        """Unwraps it after the last user, unless somebody has wrapped ours."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            self._wrapper, current = None, self._current()
            if current not in self._before:
                return
            before = self._before[current]
            if before is _INHERITED:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, before)

    def _current(self):
        return vars(self._owner).get(self._name, _INHERITED)

    def _wrapped(self, current):
        if current is _INHERITED:
            # A base class may be patched while this is.
            def method(instance, *args, **kwargs):
                inherited = super(self._owner, instance)
                return getattr(inherited, self._name)(*args, **kwargs)

        else:
            method = getattr(self._owner, self._name)

        def wrapper(*args, **kwargs):
            function = getattr(self._local, "function", None) or self._shared
            # Of several, one alone: a patch may be between this one, which was
            # left behind, and the newest. When patches go, it may be on top.
            acts = wrapper is self._wrapper or wrapper is self._current()
            if function is None or not acts:
                return method(*args, **kwargs)
            return function(method, *args, **kwargs)

        return wrapper
