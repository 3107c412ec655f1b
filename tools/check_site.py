"""Checks that each link of a built site leads somewhere: `check_site site`.

It follows links, pictures, styles and scripts from page to page, and to the
headings within pages. It does not use the network: addresses elsewhere are not
asked. What a page fetches from elsewhere, when someone reads it, is an error.
"""

import argparse
import dataclasses
import html.parser
import pathlib
import sys
import urllib.parse

# What browsers fetch at once, unlike a link that someone follows.
FETCHED = {
    ("iframe", "src"),
    ("img", "src"),
    ("script", "src"),
    ("source", "src"),
}
LINKS = FETCHED | {("a", "href"), ("link", "href")}
# Pages that are shown at an address that no one knows.
ANYWHERE = ("404.html",)


@dataclasses.dataclass(frozen=True)
class Link:
    """A link of a page.

    Attributes:
        target: What it leads to, as the page has it.
        is_fetched: Whether browsers fetch it at once.
        line: Its line in the page.
    """

    target: str
    is_fetched: bool
    line: int


class Page(html.parser.HTMLParser):
    """The links of a page, and the names that links to it may have.

    Args:
        text: The page.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[Link] = []
        self.names: set[str] = set()
        self.twice: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Notes the links and names of a tag."""
        values = dict(attrs)
        name = values.get("id")
        if name in self.names:
            self.twice.add(name)
        self.names.update({name, values.get("name")} - {None})
        for attribute, value in attrs:
            if (tag, attribute) in LINKS and value is not None:
                is_fetched = (tag, attribute) in FETCHED or (
                    tag == "link" and "stylesheet" in values.get("rel", "")
                )
                line, _ = self.getpos()
                self.links.append(Link(value, is_fetched, line))


def check(site: pathlib.Path) -> tuple[int, list[str]]:
    """Returns the number of links within a site, and what is wrong."""
    site = site.resolve()
    pages = {
        file: Page(file.read_text(encoding="utf-8"))
        for file in sorted(site.rglob("*.html"))
    }
    if not pages:
        return 0, [f"{site} has no pages."]
    checked, wrong = 0, []
    for file, page in pages.items():
        place = file.relative_to(site).as_posix()
        if place in ANYWHERE:
            continue
        wrong += [f"{place}: two of id={name}" for name in sorted(page.twice)]
        for link in page.links:
            parts = urllib.parse.urlsplit(link.target)
            if parts.scheme or parts.netloc:
                if link.is_fetched and parts.scheme != "data":
                    wrong.append(f"{place}:{link.line}: fetches {link.target}")
                continue
            checked += 1
            if fault := fault_of(file, parts, pages, site):
                wrong.append(f"{place}:{link.line}: {link.target}: {fault}")
    return checked, wrong


def fault_of(file, parts, pages, site) -> str:
    """Returns why a link of `file` leads nowhere, or ""."""
    target = file
    if parts.path:
        target = (file.parent / urllib.parse.unquote(parts.path)).resolve()
    if parts.path.startswith("/") or not target.is_relative_to(site):
        return "is outside of the site"
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return "there is no such file"
    name = urllib.parse.unquote(parts.fragment)
    if name and (target not in pages or name not in pages[target].names):
        return "there is no such heading"
    return ""


def main() -> None:
    """Prints what is wrong with a site, and fails if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=pathlib.Path, help="the built site")
    checked, wrong = check(parser.parse_args().site)
    print(*wrong, f"{checked} links, {len(wrong)} wrong.", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
