"""`tests/every_name.py` uses every name and argument of the API, and runs."""

import ast
import dataclasses
import inspect
import os
import pathlib
import subprocess
import sys

import keras
import tensorflow as tf

import keras_accum
from keras_accum import verification
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
PROGRAM = ROOT / "tests/every_name.py"

# Keras has these as well, and says what their arguments are.
METHODS_OF_KERAS = {"evaluate", "fit", "predict"}


def package_of(value):
    return (getattr(value, "__module__", None) or "").split(".")[0]


def public_functions():
    """Yields the public functions and methods of the library, by name.

    A property has None, and a class the function that it is called by.
    """
    for module in (keras_accum, keras_accum.schedules):
        for name in dir(module):
            value = getattr(module, name)
            # A mixin is not called; what it is mixed into is.
            is_called = callable(value) and not name.endswith("Mixin")
            yield name, value if is_called else None
            if isinstance(value, type):
                yield from public_methods(value)
    for cls in (verification.Verification, verification.Difference):
        for field in dataclasses.fields(cls):
            yield field.name, None


def public_methods(cls):
    """Yields what a class has that is not of Keras, nor of Python."""
    for base in cls.__mro__:
        if package_of(base) != "keras_accum":
            continue
        for name in vars(base):
            if not name.startswith("_"):
                value = getattr(base, name)
                is_called = callable(value) and name not in METHODS_OF_KERAS
                yield name, value if is_called else None


def uses_of(tree):
    """Returns what a program reads or defines: name to keywords of calls."""
    uses = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", None))
            uses.setdefault(name, set()).update(k.arg for k in node.keywords)
        elif isinstance(node, ast.Attribute):
            uses.setdefault(node.attr, set())
    return uses


def missing(tree):
    """Returns the public names and arguments that a program does not use."""
    uses, found = uses_of(tree), set()
    for name, function in public_functions():
        if name not in uses:
            found.add(name)
        if function is None:
            continue
        for parameter in inspect.signature(function).parameters.values():
            is_named = parameter.kind in (
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY,
            )
            # A method that is read off its class begins with `self`.
            if is_named and parameter.name not in {
                "self",
                *uses.get(name, ()),
            }:
                found.add(f"{name}({parameter.name}=)")
    return found


class EveryNameTest(test_utils.TestCase):
    def test_uses_every_name(self):
        tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
        self.assertEmpty(missing(tree))

    def test_sees_what_is_missing(self):
        found = missing(ast.parse("accumulator.add(gradients, weight=1.0)"))
        self.assertIn("verify", found)
        self.assertIn("add(gradients=)", found)
        self.assertNotIn("add(weight=)", found)
        self.assertNotIn("add", found)
        self.assertContainsSubset(
            {
                "GradientAccumulationModel(accum_steps=)",
                "LinearRamp(unit=)",
                "accumulate(optimizer=)",
                "distance",
                "nonfinite_windows",
                "parse",
            },
            found,
        )

    @test_utils.at_night
    def test_runs(self):
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        finished = subprocess.run(
            [sys.executable, str(PROGRAM)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        self.assertEqual(finished.returncode, 0, finished.stderr)
        self.assertEqual(
            finished.stdout.splitlines()[-1],
            f"keras_accum {keras_accum.__version__}, "
            f"Keras {keras.__version__}, TensorFlow {tf.__version__}: "
            "all passed.",
        )


if __name__ == "__main__":
    tf.test.main()
