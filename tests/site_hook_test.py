"""Links to files outside of `docs/` fit the site, and folders become pages."""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from tools import site_hook

ADDRESS = "https://example.org/me/project"


class RewriteTest(parameterized.TestCase):
    def folder(self):
        """Returns an empty folder."""
        return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def setUp(self):
        super().setUp()
        self.root = self.folder()
        self.docs = self.root / "docs"
        for file in ("README.md", "tools/a.py", "docs/b.md", "docs/how/c.md"):
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).touch()

    def rewrite(self, markdown, folder="docs", address=None):
        return site_hook.rewrite(
            markdown, self.root / folder, self.docs, self.root, address
        )

    @parameterized.parameters(
        ("[the tool](../tools/a.py)", "the tool (`tools/a.py`)"),
        ("[the\ntool](../tools/a.py).", "the\ntool (`tools/a.py`)."),
        ("[README.md](../README.md#x)", "`README.md`"),
        ("[README](../README.md)", "`README.md`"),
        ("[`a.py`](../tools/a.py)", "`tools/a.py`"),
        ("| [`f[0]`](../tools) |", "| `f[0]` (`tools`) |"),
    )
    def test_is_text_without_address(self, markdown, expected):
        self.assertEqual(self.rewrite(markdown), expected)

    @parameterized.parameters(
        ("[x](../tools/a.py)", f"[x]({ADDRESS}/blob/HEAD/tools/a.py)"),
        ("[x](../tools)", f"[x]({ADDRESS}/tree/HEAD/tools)"),
        ("[x](../README.md#y)", f"[x]({ADDRESS}/blob/HEAD/README.md#y)"),
    )
    def test_leads_to_address(self, markdown, expected):
        for address in (ADDRESS, f"{ADDRESS}/"):
            self.assertEqual(self.rewrite(markdown, address=address), expected)

    def test_is_relative_to_page(self):
        self.assertEqual(
            self.rewrite("[x](../../README.md)", "docs/how"),
            "x (`README.md`)",
        )

    @parameterized.parameters(
        "[x](b.md)",
        "[x](how/c.md#y)",
        "[x](#y)",
        "[x](https://example.org/../README.md)",
        "![x](../README.md)",
        # MkDocs warns of them, as they lead nowhere.
        "[x](../missing.py)",
        "[x](../../elsewhere.py)",
        "`[x](../README.md)`",
        "``a ` [x](../README.md)``",
        "```md\n[x](../README.md)\n```",
        "````md\n```\n[x](../README.md)\n```\n````",
    )
    def test_stays(self, markdown):
        for address in (None, ADDRESS):
            self.assertEqual(self.rewrite(markdown, address=address), markdown)

    def test_after_code(self):
        self.assertEqual(
            self.rewrite("`a` [x](../README.md) `b`\n\n```\n```\n"),
            "`a` x (`README.md`) `b`\n\n```\n```\n",
        )

    def test_folders_in_navigation(self):
        nav = [
            "b.md",
            {"Group": ["b.md"]},
            {"How": "how/"},
            {"None": "none/"},
        ]
        (self.docs / "how/a.md").touch()
        self.assertEqual(
            site_hook.with_pages(nav, self.docs),
            [
                "b.md",
                {"Group": ["b.md"]},
                {"How": ["how/a.md", "how/c.md"]},
            ],
        )


if __name__ == "__main__":
    absltest.main()
