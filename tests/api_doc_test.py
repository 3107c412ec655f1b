"""docs/api.md has each public name, and each argument with its default."""

import ast
import inspect
import pathlib
import re
from typing import ParamSpec
from typing import TypeVar

import keras
from absl.testing import absltest

import keras_accum
from keras_accum import annotations

# What `annotations` imports.
IMPORTED = (
    "Any",
    "Callable",
    "Iterable",
    "Literal",
    "ParamSpec",
    "TypeVar",
    "TypedDict",
)
PAGE = pathlib.Path(__file__).absolute().parent.parent / "docs/api.md"


def rows(heading):
    """Returns the cells of the table below a heading, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group()
    _, _, *lines = table.splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    ]


def code(cell):
    """Returns the first code in a cell."""
    return re.search(r"`([^`]+)`", cell)[1]


def shown():
    """Returns what is shown by its docstring, to the members of it."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", text, re.MULTILINE)
    return {
        name.removeprefix("keras_accum."): re.findall(
            r"^ {8}- (\w+)$", options, re.MULTILINE
        )
        for name, options in blocks
    }


def options():
    """Returns the model's own arguments, as `help` shows them."""
    signature = inspect.signature(keras_accum.GradientAccumulationModel)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def find(name):
    """Returns what a name within `keras_accum` stands for."""
    value = keras_accum
    for part in name.split("."):
        value = getattr(value, part)
    return value


class ApiDocTest(absltest.TestCase):
    def test_table_of_names(self):
        names = [code(name) for name, _ in rows("API")]
        self.assertCountEqual(names, dir(keras_accum))

    def test_docstrings(self):
        names = {
            name
            for name in dir(keras_accum)
            if callable(getattr(keras_accum, name))
        }
        names |= {f"schedules.{name}" for name in dir(keras_accum.schedules)}
        self.assertGreater(len(names), 6)
        self.assertContainsSubset(names, shown())
        for name in shown():
            with self.subTest(name):
                self.assertTrue(inspect.getdoc(find(name)))

    def test_arguments_and_defaults(self):
        self.assertLen(options(), 8)
        defaults = {
            code(name): ast.literal_eval(code(default))
            for name, default, *_ in rows("Arguments of a model")
        }
        self.assertEqual(defaults, options())

    def test_values_are_accepted(self):
        inputs = keras.Input((1,))
        for name, _, values, _ in rows("Arguments of a model"):
            for value in re.findall(r"`([^`]+)`", values):
                with self.subTest(name=name, value=value):
                    value = ast.literal_eval(value)
                    if name == "`accum_steps`":
                        self.assertIsInstance(value, int)
                    model = keras_accum.GradientAccumulationModel(
                        inputs, inputs, **{code(name): value}
                    )
                    self.assertEqual(getattr(model, code(name)), value)

    def test_docstring_of_model_has_arguments(self):
        text = inspect.getdoc(keras_accum.GradientAccumulationModel)
        arguments = text.split("\nArgs:\n")[1].split("\n\n")[0]
        self.assertEqual(
            re.findall(r"^ {4}([\w*]+):", arguments, re.MULTILINE),
            ["*args", *options(), "**kwargs"],
        )

    def test_types(self):
        types = {
            name
            for name, value in vars(annotations).items()
            if name[0].isupper()
            and name not in IMPORTED
            and not isinstance(value, (ParamSpec, TypeVar))
        }
        self.assertGreater(len(types), 5)
        names = [code(name) for name, _ in rows("Types in signatures")]
        self.assertCountEqual(names, types | {"Unit"})

    def test_members_of_model(self):
        members = shown()["GradientAccumulationModel"]
        own = {
            name
            for name in vars(keras_accum.GradientAccumulationMixin)
            if not name.startswith("_") and not hasattr(keras.Model, name)
        }
        self.assertGreater(len(own), 10)
        self.assertContainsSubset(own, members)
        for name in members:
            with self.subTest(name):
                self.assertTrue(
                    find(f"GradientAccumulationModel.{name}").__doc__
                )


if __name__ == "__main__":
    absltest.main()
