"""`BUILD` lists every Python file once, and the imports that it has."""

import ast
import functools
import pathlib

import tensorflow as tf

# Not resolved: under Bazel this is the tree of runfiles, which holds every file
# of these folders, whether or not a target lists it.
ROOT = pathlib.Path(__file__).absolute().parent.parent
FOLDERS = (
    "benchmarks",
    "conformance",
    "docs",
    "examples",
    "keras_accum",
    "tests",
    "tools",
)

# Modules of keras_accum import those of the rows above theirs, and no others. A
# package among them counts as one.
LAYERS = (
    {
        "annotations",
        "attributes",
        "callers",
        "compat",
        "halvings",
        "layer_moments",
        "noise_scale",
        "nonfinite_report",
        "outer_products",
        "system_memory",
        "warned",
    },
    {"checks", "counting", "heap", "inner_products"},
    {"schedule_table"},
    {"noise_schedule", "seesaw"},
    {
        "advice",
        "checkpoint",
        "differentiable",
        "forecast",
        "iterators",
        "loss_values",
        "options",
        "ordering",
        "origins",
        "overrides",
        "plan_table",
        "rehearsal",
        "replicas",
        "reserve",
        "second_call",
        "selection",
        "sharing",
        "whole_loss",
    },
    {
        "building",
        "control_flow",
        "functional",
        "gradients",
        "known_noise",
        "loss_tracker",
        "memory",
        "microbatch_size",
        "position",
        "recomputing",
        "recorded_calls",
        "rounded_sum",
        "rows",
        "segments",
    },
    {"reduction"},
    {
        "accumulator",
        "calls",
        "finite",
        "programs",
        "rematerialization",
        "sample",
        "saving",
        "schedules",
        "verifiable",
    },
    {"coupling", "loops", "microbatch", "microbatching"},
    {
        "added_losses",
        "findings",
        "loss_sums",
        "steps",
        "weighting",
        "window",
    },
    {
        "boundary",
        "compiled_kinds",
        "moments",
        "objectives",
        "parts",
        "repeated_state",
        "trial",
        "window_losses",
    },
    {
        "discovery",
        "inner",
        "losses",
        "nonfinite",
        "total_kind",
        "window_gradients",
    },
    {"epochs", "first_batch", "restoring", "step_loss", "window_noise"},
    {"default_steps", "nonfinite_cause", "whole_batch", "window_metrics"},
    {"each_microbatch", "replay", "window_kinds"},
    {"watch"},
    {"auto_size", "evaluation"},
    {"training"},
    {"accumulation"},
    {"dry_run", "mixin"},
    {"causes", "model"},
    {"probe", "verification"},
    {"planning"},
    {"__init__"},
)


def python_files():
    """Returns every Python file of the project, as a path from its root."""
    files = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    return {file.relative_to(ROOT).as_posix() for file in files}


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


@functools.cache
def tree_of(file):
    """Returns what `file` is to Python."""
    return ast.parse(read(file))


def read_targets():
    """Returns the targets that `BUILD` makes: name to attributes.

    Starlark is nearly a subset of Python, and the macro is read as it is. What
    `glob` finds stays a pattern.
    """
    targets = {}

    def rule(name, **attributes):
        if name in targets:
            raise ValueError(f"BUILD has two targets named {name!r}.")
        targets[name] = attributes

    def fail(message):
        raise ValueError(message)

    names = {
        "load": lambda *_: None,
        "glob": lambda patterns: patterns,
        "fail": fail,
        # They differ, as rules do.
        "py_binary": lambda **attributes: rule(**attributes),
        "py_library": lambda **attributes: rule(**attributes),
        "py_test": lambda **attributes: rule(**attributes),
    }
    exec(read("tools/python.bzl"), names)
    exec(read("BUILD"), names)
    return targets


def imported_files(file):
    """Returns the project's files that `file` imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            modules = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}:{node.lineno}: a relative import.")
            # What is imported from a package may be a module of it.
            modules = [
                (f"{node.module}.{alias.name}", node.module)
                for alias in node.names
            ]
        else:
            continue
        for candidates in modules:
            found.update(first_file(candidates))
    return found


def first_file(modules):
    """Returns the file of the first of `modules` that the project has."""
    for module in modules:
        path = module.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / file).is_file():
                return [file]
    return []


def module_of(file):
    """Returns the module of keras_accum that `file` is, or its package."""
    return pathlib.PurePath(file).with_suffix("").parts[1]


@functools.cache
def names_of(file):
    """Returns the names that the module `file` has, or None if any may be.

    That is what it defines, assigns or imports outside of functions.
    """
    names = {"__doc__", "__file__", "__name__"}
    waiting = list(tree_of(file).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(
                alias.asname or alias.name.split(".")[0] for alias in node.names
            )
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if node.name == "__getattr__":
                return None
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting.extend(ast.iter_child_nodes(node))
    return names


def missing_names(file):
    """Yields what `file` reads of the project's modules, and they lack."""
    tree = tree_of(file)
    modules = {
        alias.asname or alias.name: found[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (found := first_file([f"{node.module}.{alias.name}"]))
        and not found[0].endswith("__init__.py")
    }
    # What is named as a module may be something else in a function.
    hidden = {
        node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)
    } | {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules.keys() - hidden
        ):
            known = names_of(modules[node.value.id])
            if known is not None and node.attr not in known:
                yield f"{file}:{node.lineno}: {node.value.id}.{node.attr}"


class BuildTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.targets = read_targets()
        self.owners = {}
        for name, target in self.targets.items():
            for file in target["srcs"]:
                self.owners.setdefault(file, []).append(name)

    def test_reads_targets_and_files(self):
        self.assertIn("build_test", self.targets)
        self.assertIn("tests/build_test.py", python_files())
        self.assertIn("keras_accum/__init__.py", python_files())

    def test_every_file_is_in_one_target(self):
        missing = python_files() - set(self.owners)
        self.assertEmpty(missing, "Files that are in no target of BUILD.")
        repeated = {f: names for f, names in self.owners.items() if names[1:]}
        self.assertEmpty(repeated, "Files that are in several targets.")

    def test_no_table_has_a_file_twice(self):
        # Python, other than Bazel, takes the last of them.
        for node in ast.walk(ast.parse(read("BUILD"))):
            if isinstance(node, ast.Dict):
                keys = [ast.literal_eval(key) for key in node.keys]
                repeated = {key for key in keys if keys.count(key) > 1}
                self.assertEmpty(repeated, "Files that a table has twice.")

    def test_every_source_exists(self):
        missing = set(self.owners) - python_files()
        self.assertEmpty(missing, "BUILD lists files that do not exist.")

    def test_every_dep_exists(self):
        missing = {
            f":{name} depends on {dep}"
            for name, target in self.targets.items()
            for dep in target["deps"]
            if dep not in {f":{name}" for name in self.targets}
        }
        self.assertEmpty(missing, "BUILD has deps that are no targets of it.")

    def test_deps_are_the_imports(self):
        for name, target in self.targets.items():
            imported = set()
            for file in target["srcs"]:
                imported |= imported_files(file)
            imported -= set(target["srcs"])
            owners = [self.owners.get(file, [file])[0] for file in imported]
            self.assertEqual(
                target["deps"],
                sorted({f":{owner}" for owner in owners}),
                f"The deps of :{name} in BUILD (first) are not what it imports "
                "(second).",
            )

    def test_what_a_file_reads_of_a_module_is_there(self):
        # Benchmarks, and tests that are skipped where something is missing,
        # would be the last to find out.
        missing = [
            name for file in python_files() for name in missing_names(file)
        ]
        self.assertEmpty(missing, "Names that modules do not have.")

    def test_this_test_sees_every_folder(self):
        folders = {f.split("/")[0] for f in python_files() if "/" in f}
        self.assertEqual(
            set(self.targets["build_test"]["data"]),
            {
                "BUILD",
                "tools/python.bzl",
                *(f"{folder}/**/*.py" for folder in folders),
            },
            "`data` of :build_test in BUILD (first) is not what it reads "
            "(second).",
        )

    def test_imports_go_one_way(self):
        layer_of = {
            module: layer
            for layer, modules in enumerate(LAYERS)
            for module in modules
        }
        modules = {
            file: module_of(file)
            for file in python_files()
            if file.startswith("keras_accum/")
        }
        self.assertEqual(
            set(layer_of),
            set(modules.values()),
            "`LAYERS` (first) has not the modules that there are (second).",
        )
        wrong = {
            f"{file} imports {other}"
            for file, module in modules.items()
            for other in imported_files(file)
            if modules.get(other) != module
            and layer_of.get(modules.get(other), len(LAYERS))
            >= layer_of[module]
        }
        self.assertEmpty(wrong, "Imports against the layers of the design.")


if __name__ == "__main__":
    tf.test.main()
