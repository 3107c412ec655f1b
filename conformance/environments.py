"""Environments of the systems: each has its own, with what it needs."""

import os
import pathlib
import subprocess
import venv

from absl import flags

ROOT = pathlib.Path(__file__).absolute().parent.parent

FOLDER = flags.DEFINE_string(
    "folder",
    str(pathlib.Path.home() / ".cache" / "keras_accum_conformance"),
    "Where the environments and the results are.",
)


def python_of(name: str) -> pathlib.Path:
    """Returns the Python of an environment, which may not be made yet."""
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return pathlib.Path(FOLDER.value) / name / inside


def make(name: str, packages: tuple[str, ...]) -> pathlib.Path:
    """Makes an environment unless it is there; returns its Python.

    Args:
        name: What it is called in the folder.
        packages: What `pip install` is given, from this checkout's root.
    """
    python = python_of(name)
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *packages],
            check=True,
            cwd=ROOT,
        )
    return python


def versions(python: pathlib.Path, packages: tuple[str, ...]) -> str:
    """Returns the installed releases: "keras 3.15.1, tensorflow 2.21.0"."""
    program = (
        "import sys\nfrom importlib.metadata import version\n"
        "print(', '.join(f'{p} {version(p)}' for p in sys.argv[1:]))"
    )
    finished = subprocess.run(
        [python, "-c", program, *packages],
        check=True,
        capture_output=True,
        text=True,
    )
    return finished.stdout.strip()
