"""Trains a program of the suite, in one way, and prints what came of it.

    python -m conformance.program_worker --program=vae --way=accum_steps

Of one that draws random numbers `keras_accum.verify` says whether it is exact:
both ways would see other draws. `conformance.program_report` runs it.
"""

import argparse
import json
import pathlib
import resource
import sys
import time
import types
import warnings

import keras
import numpy as np

import keras_accum
from conformance import program_suite as suite


def run(
    program: suite.Program, way: str, epochs: int = suite.EPOCHS
) -> tuple[dict, dict]:
    """Trains; returns what can be printed, and the weights.

    Args:
        program: The program.
        way: "plain", or a key of `suite.WAYS`.
        epochs: How often it goes over its data.
    """
    text = program.plain() if way == "plain" else program.swapped(way)
    rows = suite.ROWS if way == "plain" else suite.WAYS[way][1]
    # As a module: what it registers with Keras has its name.
    module = types.ModuleType(program.name)
    sys.modules[program.name] = module
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(text, f"{program.name}.py", "exec"), module.__dict__)
        begin = time.monotonic()
        model = module.main(rows, epochs)
        seconds = time.monotonic() - begin
    said = [
        str(each.message)
        for each in caught
        if "keras_accum" in str(each.filename)
    ]
    history = getattr(model, "history", None)
    result = {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "logs": {k: v[-1] for k, v in history.history.items()},
        "warnings": said,
    }
    if way != "plain" and hasattr(module, "batch"):
        result["verified"] = str(keras_accum.verify(model, *module.batch()))
    weights = {str(i): np.asarray(w) for i, w in enumerate(model.weights)}
    return result, weights


def main():
    """Prints a line of JSON; saves the weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--way", default="plain")
    parser.add_argument("--epochs", type=int, default=suite.EPOCHS)
    parser.add_argument("--weights", required=True)
    arguments = parser.parse_args()
    program = {each.name: each for each in suite.programs()}[arguments.program]
    results, sys.stdout = sys.stdout, sys.stderr
    result, weights = run(program, arguments.way, arguments.epochs)
    np.savez(pathlib.Path(arguments.weights), **weights)
    print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
