"""Trains a program of the suite in one way, and prints what came of it.

    python -m conformance.program_worker --program=vae --way=accum_steps \
        --weights=/tmp/weights.npz

`conformance.program_report` runs it.
"""

import argparse
import json
import re
import sys
import time
import types
import warnings

import keras
import numpy as np
import tensorflow as tf

import keras_accum
from conformance import program_suite as suite


def run(
    program: suite.Program, way: str, epochs: int = suite.EPOCHS
) -> tuple[dict, list[np.ndarray]]:
    """Trains; returns what can be printed, and the weights.

    Args:
        program: The program.
        way: "plain", or a key of `suite.WAYS`.
        epochs: How often it goes over its data.
    """
    text = program.plain() if way == "plain" else program.swapped(way)
    # As a module: what it registers with Keras has its name.
    module = types.ModuleType(f"conformance.programs.{program.name}")
    sys.modules[module.__name__] = module
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(text, f"{program.name}.py", "exec"), module.__dict__)
        begin = time.monotonic()
        try:
            model = module.main(suite.rows(way), epochs)
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            if way not in program.refused:
                raise
            return {"refused": first_sentence(error)}, []
        seconds = time.monotonic() - begin
    history = getattr(model, "history", None)
    result = {
        "seconds": seconds,
        "peak": peak_bytes(),
        "logs": {key: values[-1] for key, values in history.history.items()}
        if history
        else {},
        "warnings": [
            str(each.message)
            for each in caught
            if "keras_accum" in str(each.filename)
        ],
    }
    if way != "plain" and hasattr(module, "batch"):
        result |= verified(model, module.batch())
    return result, [np.asarray(weight) for weight in model.weights]


def peak_bytes() -> int | None:
    """Returns the most memory that this process had; None where unknown."""
    try:
        # Windows has none.
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verified(model, batch) -> dict:
    """Returns what `verify` says: whether it is exact, and if not, why."""
    try:
        found = keras_accum.verify(model, *batch)
    except ValueError as error:
        return {"exact": False, "causes": [first_sentence(error)]}
    causes = (each.cause for each in found.differences if each.cause)
    return {"exact": found.exact, "causes": list(dict.fromkeys(causes))}


def first_sentence(error: Exception) -> str:
    """Returns the first sentence of an error that is ours.

    TensorFlow writes where in the graph it was before that.
    """
    text = getattr(error, "message", str(error))
    found = re.search(r"(With )?`[^`]+`.*?(?=\. |\n|\.?$)", text)
    return found[0] if found else text.splitlines()[0]


def main():
    """Prints a line of JSON; saves the weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--way", default="plain")
    parser.add_argument("--epochs", type=int, default=suite.EPOCHS)
    parser.add_argument("--weights", required=True)
    arguments = parser.parse_args()
    # Programs may print.
    results, sys.stdout = sys.stdout, sys.stderr
    result, weights = run(
        suite.program(arguments.program), arguments.way, arguments.epochs
    )
    np.savez(arguments.weights, *weights)
    print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
