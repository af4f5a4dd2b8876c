#!/usr/bin/env python3
"""Prepare and check a release of the version in pyproject.toml.

release.py prepare DATE   write version and date into CHANGELOG.md and CITATION.cff
release.py check TAG      exit with status 1 unless tag, version, CHANGELOG.md and CITATION.cff agree
release.py notes          print the section of CHANGELOG.md with absolute links
release.py links TAG      make the relative links of README.md absolute, for PyPI
"""

from __future__ import annotations

import re
import sys
import tomllib
from datetime import date
from pathlib import Path

CHANGELOG, CITATION, README = Path("CHANGELOG.md"), Path("CITATION.cff"), Path("README.md")
PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION, SOURCE = PROJECT["version"], PROJECT["urls"]["Source"]
HEADING = re.compile(rf"^## {re.escape(VERSION)}, (\S+)\n", re.MULTILINE)


def rewrite(path: Path, pattern: str | re.Pattern[str], new: str) -> None:
    """Replace all matches of a pattern in a file; SystemExit if it has none."""
    text, count = re.subn(pattern, new, path.read_text(encoding="utf-8"))
    if not count:
        raise SystemExit(f"{path} has no match of {pattern}")
    path.write_text(text, encoding="utf-8")


def prepare(day: str) -> None:
    """Write the version and the date of the release."""
    date.fromisoformat(day)
    rewrite(CHANGELOG, HEADING, f"## {VERSION}, {day}\n")
    rewrite(CITATION, r"\nversion: .*(\ndate-released: .*)?", f"\nversion: {VERSION}\ndate-released: {day}")


def check(tag: str) -> None:
    """Compare the tag with the version, and the dates of the changelog and of the citation."""
    heading = HEADING.search(CHANGELOG.read_text(encoding="utf-8"))
    citation = dict(re.findall(r"^(version|date-released): (\S+)", CITATION.read_text(encoding="utf-8"), re.MULTILINE))
    if tag != f"v{VERSION}":
        raise SystemExit(f"tag {tag} differs from version {VERSION}: tag v{VERSION}")
    if not heading or citation != {"version": VERSION, "date-released": heading[1]}:
        raise SystemExit(f"CHANGELOG.md and CITATION.cff lack the date of {VERSION}: run release.py prepare DATE")


def absolute(text: str, tag: str) -> str:
    """Make the relative links of a page in the root absolute; pictures need the raw file."""
    raw = SOURCE.replace("github.com", "raw.githubusercontent.com")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\g<1>{raw}/{tag}/", text)
    return re.sub(r"\]\((?!https?:|#)", f"]({SOURCE}/blob/{tag}/", text)


def notes() -> None:
    """Print the section of the version, without its heading."""
    _, _, rest = HEADING.split(CHANGELOG.read_text(encoding="utf-8"), maxsplit=1)
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()
    print(absolute(section, f"v{VERSION}"))


def links(tag: str) -> None:
    """Make the links of README.md absolute."""
    README.write_text(absolute(README.read_text(encoding="utf-8"), tag), encoding="utf-8")


if __name__ == "__main__":
    commands = {"prepare": prepare, "check": check, "notes": notes, "links": links}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
