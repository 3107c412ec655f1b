"""Where in a user's code something was called, for what an error says."""

import pathlib
import traceback

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
