"""Programs as Keras users write them, as they stand and with the class swapped.

A program is a file of `conformance/programs`: a script for plain Keras, after
the structure of a public one, which its first lines name. What the swap changes
stands below the line that it replaces:

```python
model = keras.Model(inputs, outputs)
# accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
```

`# accum:` alone drops that line, and `# accum+:` adds one. `main(batch_size,
epochs)` trains, and returns the model. Where the weights differ, by design or
because the program draws random numbers, `batch()` returns what
`keras_accum.verify` is to look at. `REFUSED = ("microbatch_size",)` says that
such a program is refused in that way.
"""

import ast
import dataclasses
import difflib
import pathlib
import re

import numpy as np

FOLDER = pathlib.Path(__file__).absolute().parent / "programs"
# Rows of the large batch, and how it is cut.
ROWS, STEPS = 32, 4
EPOCHS = 2
# The largest distance of weights that counts as rounding.
BOUND = 1e-4
# How the swapped program accumulates: what stands for `ways`, and the rows of
# what it gives to `fit`.
WAYS = {
    "accum_steps": (f"accum_steps={STEPS}", ROWS // STEPS),
    "microbatch_size": (f"microbatch_size={ROWS // STEPS}", ROWS),
}
_REPLACES = re.compile(r"^(\s*)# accum:(?: (.*))?$")
_ADDS = re.compile(r"^(\s*)# accum\+: (.*)$")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        name: Of its file.
        text: The file.
    """

    name: str
    text: str

    @property
    def title(self) -> str:
        """What it is."""
        return self.text.splitlines()[0].strip('"').rstrip(".")

    @property
    def source(self) -> str:
        """The address of the public program that it is written after."""
        return re.search(r"https://\S+", self.text)[0]

    @property
    def refused(self) -> tuple[str, ...]:
        """The ways to accumulate that the library refuses for it."""
        found = re.search(r"^REFUSED = (\(.*\))$", self.text, re.MULTILINE)
        return ast.literal_eval(found[1]) if found else ()

    def plain(self) -> str:
        """Returns it for plain Keras."""
        lines = self.text.splitlines()
        kept = (
            line
            for line in lines
            if not _REPLACES.match(line) and not _ADDS.match(line)
        )
        return "\n".join(kept) + "\n"

    def swapped(self, way: str) -> str:
        """Returns it with the class swapped.

        Args:
            way: A key of `WAYS`.
        """
        arguments, _ = WAYS[way]
        lines: list[str] = []
        for line in self.text.splitlines():
            replaces, adds = _REPLACES.match(line), _ADDS.match(line)
            if replaces or adds:
                indent, code = (replaces or adds).groups()
                if replaces:
                    # A comment below a `class` belongs to its body.
                    before = lines.pop()
                    indent = before[: len(before) - len(before.lstrip())]
                    if code is None:
                        continue
                line = indent + code.replace("**ways", arguments)
            lines.append(line)
        return "\n".join(lines) + "\n"

    def changes(self, way: str) -> list[str]:
        """Returns the lines that a swap changes, as a diff has them."""
        diff = difflib.unified_diff(
            self.plain().splitlines(),
            self.swapped(way).splitlines(),
            lineterm="",
            n=0,
        )
        return [
            line
            for line in diff
            if line[0] in "+-" and not line.startswith(("+++", "---"))
        ]


def names() -> list[str]:
    """Returns the names of all programs."""
    return sorted(file.stem for file in FOLDER.glob("*.py"))


def program(name: str) -> Program:
    """Returns a program."""
    return Program(name, (FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def rows(way: str) -> int:
    """Returns the rows of what a program gives to `fit`, in a way to train."""
    return ROWS if way == "plain" else WAYS[way][1]


def distance(actual, expected, before) -> float:
    """Returns how far weights are off, over the way of the last epoch.

    Args:
        actual: The weights: a list of arrays.
        expected: Those of plain Keras.
        before: Those, an epoch before.
    """
    return norm_of_difference(actual, expected) / norm_of_difference(
        expected, before
    )


def norm_of_difference(these, others) -> float:
    """Returns the norm of the difference of two lists of arrays.

    What is not a float, as the state of a random generator, does not count.
    """
    return np.sqrt(
        sum(
            np.sum(np.square(this.astype("float64") - other))
            for this, other in zip(these, others, strict=True)
            if np.issubdtype(this.dtype, np.floating)
        )
    )


def distance_of_logs(actual: dict, expected: dict) -> float:
    """Returns the largest distance of a value in the logs, relative to it."""
    return max(
        (
            abs(actual.get(key, np.inf) - value) / max(abs(value), 1e-3)
            for key, value in expected.items()
        ),
        default=0.0,
    )
