"""`tools/check_site.py` finds the links of a site that lead nowhere."""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from tools import check_site

OTHER = '<h1 id="top">Other</h1><a name="old"></a><img src="../a.png">'


class CheckSiteTest(parameterized.TestCase):
    def folder(self):
        """Returns an empty folder."""
        return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def check(self, page):
        """Returns what is wrong with a site that has `page`, and another."""
        site = self.folder()
        (site / "sub").mkdir()
        (site / "index.html").write_text(page, encoding="utf-8")
        (site / "sub/index.html").write_text(OTHER, encoding="utf-8")
        (site / "a.png").touch()
        # At an address that no one knows, its links are as they are.
        (site / "404.html").write_text('<a href="/a">', encoding="utf-8")
        return check_site.check(site)

    @parameterized.parameters(
        '<a href="sub/index.html">',
        '<a href="sub/#top">',
        '<a href="sub/index.html#old">',
        '<p id="x y"><a href="#x%20y">',
        '<a href="">',
        '<link rel="stylesheet" href="a.png?version=1">',
    )
    def test_right(self, page):
        self.assertEqual(self.check(page), (2, []))

    @parameterized.parameters(
        '<a href="https://example.org/missing">',
        '<a href="mailto:me@example.org">',
        '<link rel="canonical" href="https://example.org">',
        '<img src="data:image/png;base64,AAAA">',
    )
    def test_elsewhere(self, page):
        self.assertEqual(self.check(page), (1, []))

    @parameterized.parameters(
        ('<a href="missing.html">', "there is no such file"),
        ('<img src="missing.png">', "there is no such file"),
        ('<script src="missing.js"></script>', "there is no such file"),
        ('<a href="#missing">', "there is no such heading"),
        ('<a href="sub/index.html#missing">', "there is no such heading"),
        ('<a href="a.png#top">', "there is no such heading"),
        ('<a href="../README.md">', "is outside of the site"),
        ('<a href="/a.png">', "is outside of the site"),
        ('<script src="https://example.org/a.js"></script>', "fetches"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "fetches"),
        ('<p id="x"></p><p id="x"></p>', "two of id=x"),
    )
    def test_wrong(self, page, fault):
        _, (wrong,) = self.check(f"\n{page}")
        self.assertStartsWith(wrong, "index.html:")
        self.assertIn(fault, wrong)

    def test_no_site(self):
        _, (wrong,) = check_site.check(self.folder())
        self.assertIn("has no pages", wrong)


if __name__ == "__main__":
    absltest.main()
