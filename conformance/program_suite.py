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
`keras_accum.verify` is to look at.
"""

import dataclasses
import difflib
import pathlib
import re

FOLDER = pathlib.Path(__file__).absolute().parent / "programs"
# Rows of the large batch, and how it is cut.
ROWS, STEPS = 32, 4
EPOCHS = 2
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


def programs() -> list[Program]:
    """Returns all programs, by name."""
    return [
        Program(file.stem, file.read_text("utf-8"))
        for file in sorted(FOLDER.glob("*.py"))
    ]
