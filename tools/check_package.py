"""Checks what is to be released, in `dist/`: what it contains, and its version.

    python -m build
    python -m tools.check_package

The wheel has the library and its license, and nothing else. The source
distribution has every file of the repository but those of CI. The README that a
package index shows has no link to a file that is not beside it there.
"""

import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).absolute().parent.parent
PACKAGE = "keras_accum"
OF_CI = ".ci/"
# The pictures that pages show are far below that, and a release is to stay so.
MOST_BYTES = 2_000_000


def difference(actual: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Returns a line for each file that is missing, or there for no reason."""
    actual, expected = set(actual), set(expected)
    return [f"{name} is missing" for name in sorted(expected - actual)] + [
        f"{name} should not be there" for name in sorted(actual - expected)
    ]


def check_wheel(
    names: Iterable[str], tracked: Iterable[str], version: str
) -> list[str]:
    """Returns what is wrong with the files of a wheel.

    Args:
        names: The files.
        tracked: The files of the repository.
        version: That of the release.
    """
    info = f"{PACKAGE}-{version}.dist-info"
    expected = {name for name in tracked if name.startswith(f"{PACKAGE}/")} | {
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
        f"{info}/licenses/LICENSE",
    }
    found = difference(names, expected)
    # Checkers ask for it by this name.
    if f"{PACKAGE}/py.typed" not in expected:
        found.append("py.typed is no file of the repository")
    return found


def check_sdist(
    names: Iterable[str], tracked: Iterable[str], version: str
) -> list[str]:
    """Returns what is wrong with the files of a source distribution.

    Args:
        names: The files, in a folder of the distribution's name.
        tracked: The files of the repository.
        version: That of the release.
    """
    folder = f"{PACKAGE}-{version}"
    expected = {"PKG-INFO"} | {
        name for name in tracked if not name.startswith(OF_CI)
    }
    return difference(names, {f"{folder}/{name}" for name in expected})


def check_description(metadata: str) -> list[str]:
    """Returns what is wrong with the text that a package index shows."""
    targets = re.findall(r"\]\(\s*([^)\s]+)", metadata)
    return [
        f"the description has a link to {target}, which an index lacks"
        for target in targets
        if not re.match(r"https?://", target)
    ]


def check_versions(version: str, changelog: str, citation: str) -> list[str]:
    """Returns where a version is not told, or another one is.

    Args:
        version: That of the package.
        changelog: The text of CHANGELOG.md.
        citation: That of CITATION.cff.
    """
    heading = re.search(
        r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE
    )
    cited = dict(
        re.findall(r"^([\w-]+): \"?([^\"\n]*)", citation, re.MULTILINE)
    )
    told = {
        "CHANGELOG.md": heading.groups() if heading else None,
        "CITATION.cff": (cited.get("version"), cited.get("date-released")),
    }
    found = [
        f"{name} is of {of}, and the package of {version}"
        for name, of in told.items()
        if of is None or of[0] != version
    ]
    if not found and len(set(told.values())) > 1:
        found.append(f"the dates of the release differ: {told}")
    return found


def check(folder: pathlib.Path) -> list[str]:
    """Returns what is wrong with the distributions in a folder."""
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)[1]
    tracked = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    wheel = folder / f"{PACKAGE}-{version}-py3-none-any.whl"
    sdist = folder / f"{PACKAGE}-{version}.tar.gz"
    found = difference(
        (file.name for file in folder.iterdir()), (wheel.name, sdist.name)
    )
    if found:
        return found
    with zipfile.ZipFile(wheel) as archive:
        found += check_wheel(archive.namelist(), tracked, version)
        metadata = archive.read(f"{PACKAGE}-{version}.dist-info/METADATA")
        found += check_description(metadata.decode())
    with tarfile.TarFile.gzopen(sdist) as archive:
        files = [member.name for member in archive if member.isfile()]
        found += check_sdist(files, tracked, version)
    for file in (wheel, sdist):
        if file.stat().st_size > MOST_BYTES:
            found.append(f"{file.name} has more than {MOST_BYTES:,} bytes")
    return found + check_versions(
        version,
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        (ROOT / "CITATION.cff").read_text(encoding="utf-8"),
    )


def main() -> None:
    """Says what is wrong, and fails if anything is."""
    found = check(ROOT / "dist")
    if found:
        sys.exit("\n".join(found))
    print("The distributions have what they should, and nothing else.")


if __name__ == "__main__":
    main()
