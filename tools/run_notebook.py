"""Runs examples/large_batch.ipynb, and saves it with what it prints.

    python -m tools.run_notebook

Readers see the outputs on a code host. What a machine says of itself is left
out: the standard error, and the versions and times that Jupyter writes.
"""

import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).absolute().parent.parent
NOTEBOOK = ROOT / "examples/large_batch.ipynb"
TIMEOUT = 300  # Seconds for a cell.


def read() -> nbformat.NotebookNode:
    """Returns the notebook as it is saved."""
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: nbformat.NotebookNode) -> list[str]:
    """Runs all cells in a process of their own, with the library on its path.

    Args:
        notebook: Its outputs are replaced.

    Returns:
        The files that it left in the folder that it was started in.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=os.environ | {"PYTHONPATH": path})
        return os.listdir(folder)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Takes out what is of the machine that it ran on."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output for output in cell.outputs if output.get("name") != "stderr"
        ]
        for output in cell.outputs:
            # It stands for a picture where none can be shown.
            output.get("data", {}).pop("text/plain", None)


def main() -> None:
    """Runs it and saves it."""
    notebook = read()
    execute(notebook)
    clean(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
