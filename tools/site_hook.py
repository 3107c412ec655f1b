"""What MkDocs is told about this repository, as `hooks` of `mkdocs.yml`.

Pages link to files outside of `docs/`, as `../README.md`. These links work in
the repository. The site has no such files: there a link leads to the address of
the repository, if `repo_url` in `mkdocs.yml` has one, and is text otherwise. A
link to a file that does not exist stays as it is, and MkDocs warns of it.

A folder in the navigation, as `howto/`, stands for all pages in it.
"""

import pathlib
import re

# A block of code, code in a line, or a link; in the link the text may have
# brackets of its own. What comes first is taken, so links in code stay.
PIECE = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)`*~*[ ]*$"
    r"|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
    r"|(?<!!)\[(?P<text>(?:`[^`]*`|[^\[\]`]|\[[^\[\]]*\])*)\]"
    r"\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)
NO_PATH = ("#", "/")


def on_config(config):
    """Puts the pages of a folder in the place of the folder's name."""
    if config.nav:
        config.nav = with_pages(config.nav, pathlib.Path(config.docs_dir))
    return config


def on_page_markdown(markdown, page, config, **_):
    """Makes links to files outside of `docs/` fit for the site."""
    return rewrite(
        markdown,
        folder=pathlib.Path(page.file.abs_src_path).parent,
        docs=pathlib.Path(config.docs_dir),
        root=pathlib.Path(config.config_file_path).parent,
        address=config.repo_url,
    )


def with_pages(nav: list, docs: pathlib.Path) -> list:
    """Returns a navigation, with pages in place of folders."""
    made = []
    for entry in nav:
        title, value = (None, entry)
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
        if not isinstance(value, str) or not value.endswith("/"):
            made.append(entry)
            continue
        pages = sorted(
            page.relative_to(docs).as_posix()
            for page in (docs / value).glob("*.md")
        )
        if pages:
            made.append({title: pages})
    return made


def rewrite(
    markdown: str,
    folder: pathlib.Path,
    docs: pathlib.Path,
    root: pathlib.Path,
    address: str | None,
) -> str:
    """Returns a page with its links to files outside of `docs` changed.

    Args:
        markdown: The text of the page.
        folder: The folder that the page is in.
        docs: The folder of all pages.
        root: The folder of the repository.
        address: The repository's address, or None if it has none.
    """
    docs, root = docs.resolve(), root.resolve()

    def replace(piece):
        target = piece["target"]
        if target is None or "://" in target or target.startswith(NO_PATH):
            return piece[0]
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if file.is_relative_to(docs) or not file.is_relative_to(root):
            return piece[0]
        if not file.exists():
            return piece[0]
        inside = file.relative_to(root).as_posix()
        if not address:
            return as_text(piece["text"], inside)
        kind = "tree" if file.is_dir() else "blob"
        url = f"{address.rstrip('/')}/{kind}/HEAD/{inside}"
        return f"[{piece['text']}]({url}{'#' + anchor if anchor else ''})"

    return PIECE.sub(replace, markdown)


def as_text(text: str, path: str) -> str:
    """Returns a link's text, with the path that it leads to."""
    shown = text.strip("`")
    file = pathlib.PurePosixPath(path)
    if shown in (path, file.name, file.stem):
        return f"`{path}`"
    return f"{text} (`{path}`)"
