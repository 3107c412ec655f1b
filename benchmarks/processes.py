"""Measurements that have a process of their own."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).absolute().parent.parent


def result_of(module: str, case: Any, **environment: str) -> Any:
    """Runs a module with a case, and returns what it prints in the last line.

    Args:
        module: Such as "benchmarks.memory_plan". It is given the case as JSON,
            and prints JSON.
        case: A dataclass.
        **environment: Variables of the process, besides those of this one.

    Raises:
        RuntimeError: If the process failed.
    """
    finished = subprocess.run(
        [sys.executable, "-m", module, json.dumps(dataclasses.asdict(case))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    if finished.returncode:
        raise RuntimeError(f"{case} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])
