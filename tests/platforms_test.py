"""Trains where there is nothing that only some systems have."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf
from absl.testing import parameterized

from tests import platforms_cases as cases

ROOT = pathlib.Path(__file__).absolute().parent.parent
# Under Bazel the interpreter alone does not know the way.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
# A default encoding that has few characters, as many of Windows have.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
FOLDERS = ("benchmarks", "conformance", "examples", "keras_accum", "tools")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def python_files(folders):
    return [file for f in folders for file in (ROOT / f).rglob("*.py")]


def imported_at_once(node):
    """Yields the modules that a module imports at once, and their lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name.partition(".")[0], child.lineno
        elif isinstance(child, ast.ImportFrom):
            yield child.module.partition(".")[0], child.lineno
        yield from imported_at_once(child)


def without_encoding(tree):
    """Yields the lines that read or write text in whatever encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        # `open` and `os.fdopen` have the mode second, `Path.open` first.
        is_path = name == "open" and isinstance(node.func, ast.Attribute)
        modes = [given.get("mode"), *node.args[0 if is_path else 1 :][:1]]
        is_binary = any(
            isinstance(mode, ast.Constant) and "b" in str(mode.value)
            for mode in modes
        )
        reads_text = name in ("read_text", "write_text") or (
            name in ("open", "fdopen") and not is_binary
        )
        if reads_text and "encoding" not in given:
            yield node.lineno


class SourceTest(tf.test.TestCase, parameterized.TestCase):
    def test_imports_at_the_top_are_of_all_systems(self):
        wrong = [
            f"{file.relative_to(ROOT)}:{line} imports {module}"
            for file in python_files([*FOLDERS, "tests"])
            for module, line in imported_at_once(
                ast.parse(file.read_text(encoding="utf-8"))
            )
            if module in cases.MODULES
        ]
        self.assertEmpty(wrong)

    def test_text_has_an_encoding(self):
        wrong = [
            f"{file.relative_to(ROOT)}:{line}"
            for file in python_files(FOLDERS)
            for line in without_encoding(
                ast.parse(file.read_text(encoding="utf-8"))
            )
        ]
        self.assertEmpty(wrong)

    @parameterized.parameters(
        ("open(name)", True),
        ("open(name, 'w')", True),
        ("open(name, 'rb')", False),
        ("path.open('wb')", False),
        ("path.open()", True),
        ("path.read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
    )
    def test_sees_what_has_none(self, program, expected):
        lines = list(without_encoding(ast.parse(program)))
        self.assertEqual(lines, [1] if expected else [])

    @parameterized.parameters(
        ("import resource", ["resource"]),
        ("try:\n    from pwd import getpwnam\nfinally:\n    pass", ["pwd"]),
        ("def f():\n    import resource", []),
    )
    def test_sees_what_is_imported_at_once(self, program, expected):
        found = [name for name, _ in imported_at_once(ast.parse(program))]
        self.assertEqual(found, expected)


class AbsenceTest(tf.test.TestCase):
    @pytest.mark.thorough
    def test_trains_without_what_only_unix_has(self):
        run = subprocess.run(
            [
                sys.executable,
                "-X",
                "warn_default_encoding",
                "-m",
                "tests.platforms_cases",
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": PYTHONPATH} | ASCII,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        self.assertEqual(run.returncode, 0, run.stderr[-5000:])
        # Both workers spoke UTF-8, and no stream here has the character.
        self.assertEqual(sorted(run.stdout.splitlines()), ["[0] ?", "[1] ?"])


if __name__ == "__main__":
    tf.test.main()
