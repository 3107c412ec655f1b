"""`BUILD` lists every Python file once, and the imports that it has."""

import ast
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

# Modules of keras_accum import those of the rows above theirs, and no others.
LAYERS = (
    {"compat/hooks"},
    {
        "compat/classes",
        "compat/graphs",
        "compat/iterators",
        "compat/layers",
        "compat/losses",
        "compat/replicas",
        "compat/trainer",
        "compat/variables",
    },
    {"compat/__init__"},
    {"callers", "forecast", "outer_products", "replicas"},
    {
        "accumulator",
        "loss_tracker",
        "microbatch",
        "programs",
        "progress",
        "rehearsal",
        "selection",
        "weighting",
        "window",
    },
    {
        "epochs",
        "finite",
        "functional",
        "iterators",
        "losses",
        "microbatching",
        "moments",
        "schedules",
        "sharing",
    },
    {"boundary", "checkpoint", "nonfinite", "saving", "training"},
    {"fitting"},
    {"model"},
    {"__init__"},
)


def python_files():
    """Every Python file of the project, as a path from its root."""
    files = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    return {file.relative_to(ROOT).as_posix() for file in files}


def read_targets():
    """The `py_...` targets of `BUILD`: name to attributes.

    `BUILD` is written in a subset of Python. Lists are spelled out in it, but
    for `data`, which stays as the parser read it.
    """
    targets = {}
    for statement in ast.parse(
        (ROOT / "BUILD").read_text(encoding="utf-8")
    ).body:
        call = getattr(statement, "value", None)
        rule = getattr(getattr(call, "func", None), "id", "")
        if not rule.startswith("py_"):
            continue
        attributes = {"rule": rule, "srcs": [], "deps": []}
        for keyword in call.keywords:
            is_data = keyword.arg == "data"
            attributes[keyword.arg] = (
                keyword.value if is_data else ast.literal_eval(keyword.value)
            )
        name = attributes["name"]
        if name in targets:
            raise ValueError(f"BUILD has two targets named {name!r}.")
        targets[name] = attributes
    return targets


def imported_files(file):
    """The project's files that `file` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
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
    """The file of the first of `modules` that is one of the project's."""
    for module in modules:
        path = module.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / file).is_file():
                return [file]
    return []


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

    def test_every_program_starts_in_its_source(self):
        wrong = {
            name
            for name, target in self.targets.items()
            if target["rule"] in ("py_binary", "py_test")
            and [target.get("main")] != target["srcs"]
        }
        self.assertEmpty(wrong, "Programs without their one source as `main`.")

    def test_deps_are_the_imports(self):
        for name, target in self.targets.items():
            imported = set()
            for file in target["srcs"]:
                imported |= imported_files(file)
            imported -= set(target["srcs"])
            owners = [self.owners.get(file, [file])[0] for file in imported]
            self.assertEqual(
                sorted(target["deps"]),
                sorted({f":{owner}" for owner in owners}),
                f"`deps` of :{name} in BUILD (first) are not what it imports "
                "(second).",
            )

    def test_this_test_sees_every_folder(self):
        patterns = {
            node.value
            for node in ast.walk(self.targets["build_test"]["data"])
            if isinstance(node, ast.Constant)
        }
        folders = {f.split("/")[0] for f in python_files() if "/" in f}
        self.assertEqual(
            patterns,
            {"BUILD", *(f"{folder}/**/*.py" for folder in folders)},
            "`data` of :build_test in BUILD (first) is not what it reads "
            "(second).",
        )

    def test_imports_go_one_way(self):
        layer_of = {
            f"keras_accum/{module}.py": layer
            for layer, modules in enumerate(LAYERS)
            for module in modules
        }
        files = {f for f in python_files() if f.startswith("keras_accum/")}
        self.assertEmpty(
            files - set(layer_of), "Modules that are in no layer of `LAYERS`."
        )
        wrong = {
            f"{file} imports {other}"
            for file in files
            for other in imported_files(file)
            if layer_of.get(other, len(LAYERS)) >= layer_of[file]
        }
        self.assertEmpty(wrong, "Imports against the layers of the design.")


if __name__ == "__main__":
    tf.test.main()
