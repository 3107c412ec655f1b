"""The flag of the programs that draw a picture."""

import os
import pathlib

from absl import flags


def define(default: str) -> None:
    """Defines `--picture`.

    Args:
        default: The file to write if the flag is not given.
    """
    flags.DEFINE_string("picture", default, "The PNG file to write.")
    flags.register_validator(
        "picture",
        _is_writable_png,
        message="--picture must name a .png file in a folder that exists and"
        " may be written to.",
    )


def _is_writable_png(name):
    path = pathlib.Path(name)
    written_to = path if path.is_file() else path.parent
    return (
        path.suffix == ".png"
        and not path.is_dir()
        and os.access(written_to, os.W_OK)
    )
