"""Private names of Keras and TensorFlow are used in `compat` alone."""

import ast
import functools
import importlib.util
import pathlib
import pkgutil
import runpy
import sys
from unittest import mock

import keras
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import compat
from keras_accum.compat import names

PRIVATE_MODULES = (
    "keras.src",
    "tensorflow.compiler",
    "tensorflow.core",
    "tensorflow.python",
)
# Attributes that look public, but are in no documentation.
UNDOCUMENTED = {
    "__internal__",
    "capture",
    "consumers",
    "extended",
    "op_def",
    "raw_ops",
}
# The same of what is given by a string.
UNDOCUMENTED_STRINGS = {"_noinline"}
# What reads or sets an attribute that is given by a string.
ATTRIBUTE_FUNCTIONS = {
    "attribute",
    "delattr",
    "getattr",
    "hasattr",
    "setattr",
    "__delattr__",
    "__setattr__",
    "set_untracked",
}
# What `compat.names` does not ask for: releases, or objects, may lack it.
OPTIONAL = {
    "GLOBAL_SEED_GENERATOR",
    "_autoconvert_optionals",
    "_keras_logits",
    "_remat_mode",
    "_update_renorm_statistics",
}
# Attributes of ours on objects of others.
PREFIX = "_accum"


@functools.cache
def names_of_others():
    """Returns the names that objects of Keras and TensorFlow have."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", loss="mse", metrics=["mae"])
    model.train_on_batch(tf.ones((1, 2)), tf.ones((1, 2)))
    variable = tf.Variable(1.0)
    objects = [
        keras.Model(model.inputs, model.outputs),
        model,
        model.layers[0],
        model.optimizer,
        *model.metrics,
        model.weights[0],
        variable,
        variable.handle,
        tf.Graph(),
        tf.data.Dataset.range(1),
        tf.distribute.get_strategy(),
        keras.losses.MeanSquaredError(),
        tf.train.experimental.PythonState,
    ]
    return set().union(*map(dir, objects))


def is_in_compat(name):
    return f"{name}.".startswith(f"{compat.__name__}.")


def read_modules():
    """Returns the code of each module, by its name."""
    names = [keras_accum.__name__]
    names += [
        module.name
        for module in pkgutil.walk_packages(
            keras_accum.__path__, f"{keras_accum.__name__}."
        )
    ]
    return {
        name: ast.parse(
            pathlib.Path(importlib.util.find_spec(name).origin).read_text(
                encoding="utf-8"
            )
        )
        for name in names
    }


def is_private(name):
    return name.startswith("_") and not (
        name.startswith("__") or name == "_" or name.startswith(PREFIX)
    )


def is_in_private_module(name):
    return f"{name}.".startswith(tuple(f"{each}." for each in PRIVATE_MODULES))


def defined_names(tree):
    """Returns the names of a module's attributes, methods and globals."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, (ast.Module, ast.ClassDef)):
            names |= {
                target.id
                for statement in node.body
                for target in ast.walk(statement)
                if isinstance(statement, (ast.Assign, ast.AnnAssign))
                and isinstance(target, ast.Name)
                and isinstance(target.ctx, ast.Store)
            }
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and is_own_object(node.value)
        ):
            names.add(node.attr)
    return names


def is_own_object(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree, ours):
    """Returns the private names of others in a module, with their lines.

    Args:
        tree: The code of the module.
        ours: What all modules define.
    """
    finders = {
        ast.Import: found_in_import,
        ast.ImportFrom: found_in_import,
        ast.Attribute: found_in_attribute,
        ast.Call: found_in_call,
        ast.Constant: found_in_constant,
        ast.ClassDef: found_in_class,
    }
    uses = [
        (node, use)
        for node in ast.walk(tree)
        if type(node) in finders
        for use in finders[type(node)](node, ours)
    ]
    uses += [(node, ast.unparse(node)) for node in ambiguous(tree)]
    return [f"{node.lineno}: {use}" for node, use in uses]


def ambiguous(tree):
    """Attributes that might be of others, outside of our class that has them.

    An object of ours may have a name that others have for theirs.
    """
    attributes = {
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and not is_own_object(node.value)
        and node.attr in names_of_others()
    }
    for cls in ast.walk(tree):
        if isinstance(cls, ast.ClassDef):
            names = defined_names(cls)
            attributes -= {
                node
                for node in ast.walk(cls)
                if getattr(node, "attr", None) in names
            }
    return attributes


def found_in_import(node, ours):
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{name}" for name in names]
    return [
        name
        for name in names
        if is_in_private_module(name)
        or any(map(is_private, name.split(".")))
        and not name.startswith("keras_accum.")
    ]


def found_in_attribute(node, ours):
    is_found = node.attr in UNDOCUMENTED or is_in_private_module(
        ast.unparse(node).replace("tf.", "tensorflow.", 1)
    )
    if is_private(node.attr):
        is_found |= node.attr not in ours
    return [ast.unparse(node)] if is_found else []


def found_in_call(node, ours):
    function = getattr(node.func, "attr", getattr(node.func, "id", None))
    if function not in ATTRIBUTE_FUNCTIONS:
        return []
    return [
        ast.unparse(node)
        for argument in node.args
        if isinstance(argument, ast.Constant)
        and isinstance(argument.value, str)
        and is_private(argument.value)
        and (argument.value not in ours or argument.value in names_of_others())
    ]


def found_in_constant(node, ours):
    is_string = isinstance(node.value, str)
    return (
        [node.value] if is_string and node.value in UNDOCUMENTED_STRINGS else []
    )


def found_in_class(node, ours):
    """Returns what may override a method of Keras's, as in mixins."""
    if not node.bases and not node.name.endswith("Mixin"):
        return []
    return [
        f"{node.name}.{name}"
        for name in defined_names(node)
        if is_private(name) and name in names_of_others()
    ]


def names_used(tree):
    """Returns the names that a module of `compat` needs of others.

    Without what they are names of, which the code does not always say.
    """
    imported = [
        (f"{node.module}.{alias.name}", alias)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and is_in_private_module(node.module)
        for alias in node.names
    ]
    # Of a module, what is read of it; else the name itself.
    modules = {
        alias.asname or alias.name
        for path, alias in imported
        if path in sys.modules
    }
    used = {alias.name for path, alias in imported if path not in sys.modules}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_others = is_private(node.attr) and not is_own_object(node.value)
            if (
                is_others
                or node.attr in UNDOCUMENTED
                or ast.unparse(node.value) in modules
            ):
                used.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isidentifier() and is_private(node.value):
                used.add(node.value)
        if isinstance(node, ast.ClassDef):
            overrides = found_in_class(node, set())
            used.update(name.rpartition(".")[2] for name in overrides)
    return used - {"_replace"}  # Of named tuples, and documented.


class PackageTest(tf.test.TestCase):
    def test_private_names_are_used_in_compat_alone(self):
        modules = {
            name: tree
            for name, tree in read_modules().items()
            if not is_in_compat(name)
        }
        # All are looked at, however deep, and compat is not.
        self.assertIn("keras_accum.accumulator", modules)
        self.assertIn("keras_accum.boundary", modules)
        self.assertNotIn("keras_accum.compat", modules)
        self.assertNotIn("keras_accum.compat.trainer", modules)
        ours = set().union(*map(defined_names, modules.values()))
        uses = [
            f"{name}:{use}"
            for name, tree in modules.items()
            for use in private_uses(tree, ours)
        ]
        self.assertEmpty(uses, "Private names outside of keras_accum.compat.")


class ListTest(tf.test.TestCase):
    """`compat.names` has each private name that `compat` uses."""

    def test_is_complete(self):
        trees = {
            name: tree
            for name, tree in read_modules().items()
            if is_in_compat(name) and name != names.__name__
        }
        self.assertIn("keras_accum.compat.trainer", trees)
        used = set().union(*map(names_used, trees.values()))
        listed = OPTIONAL.union(*names.NAMES.values())
        self.assertEmpty(used - listed, "Names that the list lacks.")
        words = {
            word
            for tree in trees.values()
            for node in ast.walk(tree)
            for word in vars(node).values()
            if isinstance(word, str)
        }
        self.assertEmpty(listed - words, "Listed names that are not used.")

    def test_all_are_there(self):
        names.check_all()

    def test_objects_have_what_methods_name(self):
        self.assertTrue(names.has(keras.Model, "_loss_tracker"))
        self.assertTrue(names.has(keras.Sequential, "_loss_tracker"))
        self.assertFalse(names.has(keras.Layer, "_loss_tracker"))

    def test_what_is_missing_is_refused_by_name(self):
        for path, missing in (
            ("keras.src.losses.loss", "keras.src.losses.loss._gone"),
            ("keras.Model", "keras.Model._gone"),
            ("keras.src.gone.Class", "keras.src.gone.Class"),
            ("tensorflow.gone", "tensorflow.gone"),
        ):
            package = path.split(".")[0]
            version = {"keras": keras, "tensorflow": tf}[package].__version__
            major, minor = version.split(".")[:2]
            with (
                mock.patch.dict(names.NAMES, {path: ("_gone",)}),
                self.assertRaisesRegex(
                    ImportError,
                    f"^keras_accum uses `{missing}`, which (Keras|TensorFlow) "
                    f"{version} does not have; install "
                    rf"{package}<{major}\.{minor} or a newer keras_accum\.$",
                ),
            ):
                runpy.run_path(compat.__file__)

    def test_releases_that_are_too_old_are_refused(self):
        with (
            mock.patch.dict(names.NAMES, {"keras.Model": ("_gone",)}),
            mock.patch.object(keras, "__version__", "3.7.0"),
            self.assertRaisesRegex(
                ImportError,
                r"Keras 3\.7\.0 does not have; install keras>=3\.8\.$",
            ),
        ):
            names.check_all()


class ReadingTest(parameterized.TestCase):
    """The test above sees what it looks for."""

    @parameterized.parameters(
        "import keras.src",
        "from keras import src as inner; from keras.src import backend",
        "from tensorflow.python.ops import math_ops",
        "from tensorflow.compiler.xla.service import hlo_pb2",
        "from tensorflow import _api",
        "keras.src.backend",
        "tf.python.ops",
        "tf.__internal__.distribute",
        "tf.raw_ops.Empty(shape=[1])",
        "graph.capture(handle)",
        "handle.consumers()",
        "op.op_def",
        "strategy.extended.update",
        'options = {"_noinline": True}',
        "variable._aggregation",
        "model._loss_tracker = None",
        "self._symbolic_build()",
        "super()._flatten_layers()",
        'getattr(model, "_loss_tracker", None)',
        'object.__setattr__(model, "_loss_tracker", None)',
        "class AMixin:\n    def _maybe_symbolic_build(self): pass",
        "class A(B):\n    def build(self): self._metrics = []",
        "class AMixin:\n    _auto_config = True",
        # Of a class of ours, and of Keras's as well.
        "class A:\n    def build(self): self._layers = 1\n\nmodel._layers",
    )
    def test_finds(self, code):
        tree = ast.parse(code)
        self.assertNotEmpty(private_uses(tree, defined_names(tree)))

    @parameterized.parameters(
        '"""Uses no `keras.src`, nor `_noinline` of `tf.raw_ops`."""',
        "# tensorflow.python",
        "tf.compat.v1.get_default_graph()",
        "class A:\n    def _own(self): return self._own()\n\na._own()",
        "class A:\n    def build(self): self._own = self.__dict__",
        "class A:\n    _own = None\n\nmodel._own",
        "class A:\n    _value = 1\n    def equals(self, b): return b._value",
        "model._accum_window",
        'name.split("_")',
        'getattr(model, "optimizer")',
        "from keras_accum.window import _private",
    )
    def test_does_not_find(self, code):
        tree = ast.parse(code)
        self.assertEmpty(private_uses(tree, defined_names(tree)))


if __name__ == "__main__":
    tf.test.main()
