"""docs/troubleshooting.md has all errors and warnings of the library.

They are read from its source: what is raised, and what is given to functions
that warn. Names and functions that stand for a message, or for a part of it,
are followed to the strings.
"""

import ast
import dataclasses
import functools
import itertools
import pathlib
import re

from absl.testing import absltest

ROOT = pathlib.Path(__file__).absolute().parent.parent
PAGE = ROOT / "docs/troubleshooting.md"

# Functions that tell users something, and where their message is.
TELLING = {
    "assert_equal": (2, "InvalidArgumentError"),
    "warn": (0, "Warning"),
    "warn_once": (0, "Warning"),
    "warning": (0, "Warning"),
}
# No user meets these.
EXCLUDED = {
    "Outputs must have the rows of the batch.": "Caught: what losses are is "
    "then not measured.",
}
# Letters that a quotation needs to have: all, if a message has fewer.
ENOUGH = 25
# Stands for what is known only when the library runs.
VALUE = "..."
# How many names and functions are followed, one after the other. Without an end
# they lead all over the library.
DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Message:
    """What the library says.

    Attributes:
        text: Its text, up to what was received; "" if it was not found.
        kind: What the page is to call it: the class of an error, or "Warning".
        place: Where it is raised or given.
    """

    text: str
    kind: str
    place: str = dataclasses.field(compare=False)


class Source:
    """The code of modules, with what it defines, assigns and calls.

    Args:
        files: The modules' names, to their code.
    """

    def __init__(self, files):
        self._functions, self._calls, self._values = {}, {}, {}
        # Of each node, the function that it is in, or the module's name.
        self._scopes = {}
        for module, code in files.items():
            self._read(ast.parse(code), module, module)

    def _read(self, node, module, scope):
        self._scopes[node] = module, scope
        if isinstance(node, ast.FunctionDef):
            self._functions[node.name] = scope = node
        elif isinstance(node, ast.Call):
            self._calls.setdefault(last_name(node.func), []).append(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                key = scope, last_name(target)
                self._values.setdefault(key, []).append(node.value)
        for child in ast.iter_child_nodes(node):
            self._read(child, module, scope)

    def messages(self):
        """Returns all messages, each once."""
        found = {}
        for node, (module, _) in self._scopes.items():
            expression, kind = self._told_by(node)
            if expression is None:
                continue
            texts = set(map(joined, self._texts(expression)))
            for text in sorted(filter(letters, texts)) or [""]:
                message = Message(text, kind, f"{module}:{node.lineno}")
                found.setdefault(message, message)
        return list(found)

    def _told_by(self, node):
        """Returns the expression of a message, and its kind; or two None."""
        # Without a call, what is raised is of others, or has no message.
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            # A function may make the error.
            made = self._functions.get(last_name(node.exc.func))
            error = returned_by(made)[0] if made else node.exc
            # TensorFlow's have a node and an operation before it, here None.
            given = [each for each in error.args if not is_none(each)]
            return (given or [error])[0], last_name(error.func)
        if isinstance(node, ast.Call):
            place, kind = TELLING.get(last_name(node.func), (0, None))
            _, scope = self._scopes[node]
            # One of them may call another, with what it was given.
            if kind and getattr(scope, "name", None) not in TELLING:
                return (node.args[place:] or [node])[0], kind
        return None, None

    def _texts(self, node, depth=0):
        """Returns what an expression may be, each time as a list of strings.

        Args:
            node: The expression.
            depth: How many names and functions were followed to it.
        """
        texts = functools.partial(self._texts, depth=depth)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [[node.value]]
        if isinstance(node, ast.JoinedStr):
            return together(map(texts, node.values))
        if isinstance(node, ast.FormattedValue) and node.conversion < 0:
            return texts(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return together(map(texts, (node.left, node.right)))
        if isinstance(node, ast.IfExp):
            return texts(node.body) + texts(node.orelse)
        followed = self._followed(node) if depth < DEPTH else []
        return [
            text for each in followed for text in self._texts(each, depth + 1)
        ] or [[VALUE]]

    def _followed(self, node):
        """Returns the expressions that a name or a call stands for."""
        module, scope = self._scopes[node]
        if isinstance(node, ast.Call):
            if last_name(node.func) == "rstrip":
                return [node.func.value]
            return returned_by(self._functions.get(last_name(node.func)))
        if isinstance(node, ast.Attribute):
            # Of another module.
            return self._values.get((last_name(node.value), node.attr), [])
        if not isinstance(node, ast.Name):
            return []
        if isinstance(scope, ast.FunctionDef):
            names = [each.arg for each in scope.args.args]
            if node.id in names:
                place = names.index(node.id) - (names[0] == "self")
                calls = self._calls.get(scope.name, [])
                given = [argument(call, place, node.id) for call in calls]
                return list(itertools.chain(*given))
            if (scope, node.id) in self._values:
                return self._values[scope, node.id]
        return self._values.get((module, node.id), [])


def last_name(node):
    """Returns the name, without what it is an attribute of; "" for others."""
    return getattr(node, "attr", None) or getattr(node, "id", "")


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def argument(call, place, name):
    """Returns the argument that a call gives, in a list; [] if it is none."""
    if place < len(call.args):
        return [call.args[place]]
    return [each.value for each in call.keywords if each.arg == name]


def returned_by(function):
    """Returns the expressions that a function returns; none if it is None."""
    return [
        node.value
        for node in (ast.walk(function) if function else [])
        if isinstance(node, ast.Return) and node.value is not None
    ]


def together(alternatives):
    """Returns all ways to put one of each of `alternatives` together."""
    return [
        list(itertools.chain(*parts))
        for parts in itertools.product(*alternatives)
    ]


def joined(parts):
    """Returns a message, from its parts, as the page quotes it."""
    text = " ".join(re.sub(r"%\w", VALUE, "".join(parts)).split())
    return text.partition(" Received:")[0]


def letters(text):
    """Returns how many letters and digits there are in a text."""
    return len(re.findall(r"\w", text))


def is_quoted_by(message, quotation):
    """Returns whether a quotation is the beginning of a message.

    Where the quotation has dots, the message may have anything.
    """
    pieces = map(str.strip, quotation.split(VALUE))
    if not re.match(".*?".join(map(re.escape, pieces)), message):
        return False
    return letters(quotation) >= min(ENOUGH, letters(message))


def read_page(text):
    """Returns the page's entries: quotations, to what is written below."""
    entries = re.findall(
        r"^### `` (.*?) ``\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE
    )
    return dict(entries)


def messages_of_library():
    """Returns all messages, with those that are excluded."""
    files = sorted((ROOT / "keras_accum").rglob("*.py"))
    return Source(
        {
            # `compat` has modules of the same names.
            file.relative_to(ROOT / "keras_accum").with_suffix("").as_posix(): (
                file.read_text(encoding="utf-8")
            )
            for file in files
        }
    ).messages()


class PageTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.text = PAGE.read_text(encoding="utf-8")
        cls.entries = read_page(cls.text)
        cls.all = messages_of_library()
        cls.messages = [each for each in cls.all if each.text not in EXCLUDED]

    def test_finds_messages(self):
        unread = [each.place for each in self.all if not each.text]
        self.assertEmpty(unread, "The text of these messages is not found.")
        self.assertContainsSubset(EXCLUDED, {each.text for each in self.all})

    def test_every_message_is_in_the_page(self):
        missing = [
            f"{message.place}: {message.text}"
            for message in self.messages
            if not any(is_quoted_by(message.text, q) for q in self.entries)
        ]
        self.assertEmpty(
            missing, "docs/troubleshooting.md lacks messages of the library."
        )

    def test_every_quotation_is_in_the_library(self):
        unknown = [
            quotation
            for quotation in self.entries
            if not any(is_quoted_by(m.text, quotation) for m in self.messages)
        ]
        self.assertEmpty(
            unknown, "docs/troubleshooting.md quotes what the library lacks."
        )

    def test_page_names_the_kind(self):
        wrong = [
            f"{message.kind}: {quotation}"
            for quotation, body in self.entries.items()
            for message in self.messages
            if is_quoted_by(message.text, quotation)
            # Up to the end of the first sentence.
            and message.kind not in body.partition(". ")[0]
        ]
        self.assertEmpty(
            wrong, "docs/troubleshooting.md does not say what these are."
        )

    def test_page_says_which_warnings_are_harmless(self):
        silent = [
            quotation
            for quotation, body in self.entries.items()
            if body.lstrip().startswith("Warning") and "harmless" not in body
        ]
        self.assertEmpty(silent, "Warnings that may be harmless, or not.")

    def test_page_has_each_heading_once(self):
        headings = re.findall("^##.*", self.text, re.MULTILINE)
        repeated = {each for each in headings if headings.count(each) > 1}
        self.assertEmpty(repeated, "Headings that are there twice.")


class SourceTest(absltest.TestCase):
    def read(self, *lines, **others):
        files = {"mine": "\n".join(lines)} | others
        found = Source(files).messages()
        return {(each.text, each.kind) for each in found}

    def test_strings(self):
        self.assertEqual(
            self.read(
                "raise ValueError('`x` must be 1, '",
                "    f'{2 * y} or {z!r}. Received: no')",
            ),
            {("`x` must be 1, ... or ....", "ValueError")},
        )
        self.assertEqual(
            self.read("logging.warning('No %d, %s', a, b)"),
            {("No ..., ...", "Warning")},
        )

    def test_names_and_functions(self):
        self.assertEqual(
            self.read(
                "TAIL = 'the tail'",
                "def f(self):",
                "    head = 'a' if self else 'b'",
                "    self.warn_once(f'{head}, ' + TAIL)",
                "    self.warn_once(other.TEXT)",
                "    self.warn_once(other.say(1))",
                other="TEXT = 'text'\ndef say(x): return f'say {x.y()}'",
            ),
            {
                ("a, the tail", "Warning"),
                ("b, the tail", "Warning"),
                ("text", "Warning"),
                ("say ...", "Warning"),
            },
        )

    def test_arguments(self):
        self.assertEqual(
            self.read(
                "class A:",
                "    def check(self, value, name):",
                "        raise TypeError(f'{name} is wrong')",
                "    def f(self):",
                "        self.check(1, 'one')",
                "        self.check(2, name='two')",
            ),
            {("one is wrong", "TypeError"), ("two is wrong", "TypeError")},
        )

    def test_errors_that_a_function_makes(self):
        self.assertEqual(
            self.read(
                "def f(what):",
                "    return errors.OpError(None, None, f'{what} failed')",
                "raise f('It')",
            ),
            {("It failed", "OpError")},
        )

    def test_what_cannot_be_read_is_there(self):
        self.assertEqual(
            self.read("raise ValueError(make())", "warn(message='No.')"),
            {("", "ValueError"), ("", "Warning")},
        )
        self.assertEqual(self.read("raise StopAll()"), {("", "StopAll")})
        self.assertEmpty(self.read("raise", "raise error from None"))


class QuotationTest(absltest.TestCase):
    def test_begins_the_message(self):
        message = "`x` of ... must be positive, since it is a length."
        for quotation, expected in (
            ("`x` of ... must be positive, since it is", True),
            ("`x` of ... must be ..., since it is a length", True),
            ("`x` of 7 must be positive, since it is", False),
            ("x of ... must be positive, since it is", False),
            ("must be positive, since it is a length.", False),
            ("`x` of ...", False),
        ):
            self.assertEqual(is_quoted_by(message, quotation), expected)

    def test_all_of_a_short_message(self):
        self.assertTrue(is_quoted_by("No.", "No."))
        self.assertFalse(is_quoted_by("No way.", "No"))


if __name__ == "__main__":
    absltest.main()
