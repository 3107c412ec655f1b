"""Measures how `keras_accum` is built, from its sources alone.

    python tools/structure.py

prints a table. `tests/structure_test.py` holds the figures to their bounds.
"""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).absolute().parent.parent / "keras_accum"

# The model's class, and what it is built of.
MODEL = "GradientAccumulationMixin"
# Where programs and loops are made.
PROGRAMS = ("training", "loops", "boundary", "auto_size")
# From the loop of `fit` to the sum of gradients: the functions on the stack
# while the first call is traced. Where the device counts, there is one more,
# `Programs._begin_and`. `tests/structure_test.py` finds them out.
PATH = (
    ("training", "TrainFunction.__call__"),
    ("loops", "make_looking_loop.function"),
    ("training", "Programs.make_step.step"),
    ("control_flow", "if_there"),
    ("steps", "train_microbatch"),
    ("window", "Window.add"),
    ("window_gradients", "Gradients.add"),
    ("accumulator", "GradientAccumulator.add_microbatch"),
    ("accumulator", "GradientAccumulator._add_gradients"),
    ("gradients", "add"),
)


def modules() -> dict[str, ast.Module]:
    """Parses every module, by its name within the package."""
    return {
        file.relative_to(PACKAGE)
        .with_suffix("")
        .as_posix()
        .replace("/", "."): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def functions(node: ast.AST, prefix: str = ""):
    """Yields every function within a node: its dotted name, and the node."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            if isinstance(child, ast.FunctionDef):
                yield prefix + name, child
            yield from functions(child, f"{prefix}{name}.")
        else:
            yield from functions(child, prefix)


def num_lines(node: ast.AST) -> int:
    """Returns how many lines a definition has."""
    return node.end_lineno - node.lineno + 1


def model_classes(trees) -> dict[str, tuple[str, ast.ClassDef]]:
    """Returns the model's class and its bases, but those in `compat`."""
    classes = {
        node.name: (module, node)
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not module.startswith("compat")
    }
    found, wanted = {}, [MODEL]
    while wanted:
        name = wanted.pop()
        if name in classes:
            found[name] = classes[name]
            wanted += [ast.unparse(base) for base in classes[name][1].bases]
    return found


def own_attributes(cls: ast.ClassDef) -> set[str]:
    """Returns what a class sets on its objects, and what it defines."""
    names = {name for name, _ in functions(cls) if "." not in name}
    for node in ast.walk(cls):
        if isinstance(node, ast.AnnAssign) and isinstance(
            node.target, ast.Name
        ):
            names.add(node.target.id)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            "set_untracked"
        ):
            names.add(node.args[1].value)
    return names


def private_data(classes) -> set[str]:
    """Returns the private attributes of ours that hold something."""
    return {
        name
        for _, cls in classes.values()
        for name in own_attributes(cls) - {name for name, _ in functions(cls)}
        if name.startswith("_accum")
    }


def accesses_across(classes) -> int:
    """Counts `self.x` in one of the classes where another defines `x`."""
    owned = {name: own_attributes(cls) for name, (_, cls) in classes.items()}
    return sum(
        isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "self"
        and node.attr not in owned[name]
        and any(node.attr in others for others in owned.values())
        for name, (_, cls) in classes.items()
        for node in ast.walk(cls)
    )


def reaches_into_model(trees, classes) -> int:
    """Counts lines that reach the model's private attributes from outside."""
    names = private_data(classes)
    return len(
        {
            (module, node.lineno)
            for module, tree in trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in names
            and ast.unparse(node.value) not in ("self", "cls")
        }
    )


def enumerations(trees) -> int:
    """Counts functions that name most kinds of what a window gathers."""
    parts = {
        node.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and "Part" in map(ast.unparse, node.bases)
    }
    (keys,) = (
        {key.value for key in node.keys}
        for node in ast.walk(trees["window_kinds"])
        if isinstance(node, ast.Dict) and len(node.keys) == len(parts)
    )
    known = parts | keys
    return sum(
        sum(
            name in known
            for name in {
                getattr(inner, "id", None) or getattr(inner, "value", None)
                for inner in ast.walk(node)
                if isinstance(inner, ast.Name)
                or (
                    isinstance(inner, ast.Constant)
                    and isinstance(inner.value, str)
                )
            }
        )
        > len(parts) // 2
        for tree in trees.values()
        for _, node in functions(tree)
    )


def depth(node: ast.FunctionDef) -> int:
    """Returns how many functions deep a function's own functions are."""
    inner = [child for _, child in functions(node)]
    return 1 + max(map(depth, inner)) if inner else 0


def inner_functions(tree: ast.Module):
    """Yields the functions within functions of a module."""
    for node in tree.body:
        methods = node.body if isinstance(node, ast.ClassDef) else [node]
        for method in methods:
            if isinstance(method, ast.FunctionDef):
                yield from functions(method)


def calls(tree: ast.AST, name: str) -> int:
    """Counts the calls of a name."""
    return sum(
        isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] == name
        for node in ast.walk(tree)
    )


def check_path(trees) -> int:
    """Returns the length of `PATH`; raises if a function is not there."""
    for module, name in PATH:
        if name not in dict(functions(trees[module])):
            raise ValueError(f"There is no {name} in {module}.py.")
    return len(PATH)


def measures() -> dict[str, tuple[int, int]]:
    """Returns each figure and its bound, by what it is."""
    trees = modules()
    classes = model_classes(trees)
    lines = {
        name: len(
            (PACKAGE / path(name)).read_text(encoding="utf-8").splitlines()
        )
        for name in trees
    }
    made = [
        name
        for module in PROGRAMS
        for name, _ in functions(trees[module])
        if name.rpartition(".")[2].startswith("make_")
    ]
    inner = [
        each for module in PROGRAMS for each in inner_functions(trees[module])
    ]
    outer = [
        node for module in PROGRAMS for _, node in functions(trees[module])
    ]
    programs = next(
        node
        for node in trees["training"].body
        if getattr(node, "name", "") == "Programs"
    )
    adders = [
        node
        for node in ast.walk(programs)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "self.microbatch"
    ]
    conditions = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and calls(node, "signature")
    ]
    return {
        "lines of the model class over all its mixins": (
            sum(num_lines(cls) for _, cls in classes.values()),
            500,
        ),
        "private attributes of ours on the model": (
            len(private_data(classes)),
            2,
        ),
        "`self.x` from one mixin's file into another": (
            accesses_across(classes),
            0,
        ),
        "lines that reach `model._something` of ours": (
            reaches_into_model(trees, classes),
            10,
        ),
        "places that enumerate what a window gathers": (
            enumerations(trees),
            1,
        ),
        "`make_*` functions where programs are made": (len(made), 9),
        "inner functions there": (len(inner), 20),
        "how deep these are": (max(map(depth, outer)), 2),
        "steps that train": (
            sum(calls(tree, "if_there") for tree in trees.values()),
            1,
        ),
        "what adds a micro-batch": (len(adders), 3),
        "mechanisms for an exhausted iterator": (
            sum(calls(tree, "switch_case") for tree in trees.values()),
            1,
        ),
        "mechanisms for tracing again": (len(conditions), 1),
        "own frames from `fit` to the sum of gradients": (
            check_path(trees),
            10,
        ),
        "modules over 250 lines": (
            sum(number > 250 for number in lines.values()),
            8,
        ),
        "lines of the longest module": (max(lines.values()), 450),
        "modules that import private names outside of `compat`": (
            sum(
                imports_private_names(tree)
                for module, tree in trees.items()
                if not module.startswith("compat")
            ),
            0,
        ),
    }


def path(module: str) -> str:
    """Returns the file of a module, within the package."""
    return module.replace(".", "/") + ".py"


def imports_private_names(tree: ast.Module) -> bool:
    """Returns whether a module imports what Keras or TensorFlow hide.

    `tests/private_names_test.py` looks at attributes as well.
    """
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ] + [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    ]
    hidden = ("keras.src", "tensorflow.python", "tensorflow.compiler")
    return any(name.startswith(hidden) for name in names)


def main() -> None:
    """Prints the table."""
    print("| measure | is | at most |\n| --- | ---: | ---: |")
    for name, (value, bound) in measures().items():
        print(f"| {name} | {value} | {bound} |")


if __name__ == "__main__":
    main()
