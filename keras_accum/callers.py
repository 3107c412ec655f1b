"""Where in a user's code something was called."""

import inspect
import pathlib
import traceback
from collections.abc import Callable

import keras


def line_of_caller() -> str:
    """Returns the last line of the stack that is neither Keras's nor ours."""
    folders = tuple(
        str(pathlib.Path(file).parent) for file in (__file__, keras.__file__)
    )
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(folders):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "an unknown line"


def path_from(function: Callable) -> tuple:
    """Returns by which calls a function has come to what calls this.

    Two calls from one place in the code have the same path, such as those of a
    loop, and two from different places have not.

    Args:
        function: One that is on the stack; else the path is the whole stack.
    """
    frame, path = inspect.currentframe().f_back, []
    while frame is not None and frame.f_code is not function.__code__:
        path.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(path)
