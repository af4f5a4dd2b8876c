"""Relative links, anchors, and names of files and tests in the documentation have a target."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md")),
    *(ROOT / name for name in ("SECURITY.md", "reproduce/README.md", ".github/pull_request_template.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CODE = re.compile(r"^```.*?^```|`(?:[^`\n]|\n(?!\n))*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page: its headings, with GitHub's naming, and its ids."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    names: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return {*names, *re.findall(r"<a id=\"([^\"]+)\">", prose)}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that have no target."""
    broken = []
    for link in ("".join(match) for match in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_have_a_target(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A `heading`, twice\n\n# A heading, twice\n\n```\n# no heading\n```\n")
    good = ["other.md", "other.md#a-heading-twice", "#here", "https://example.org/none"]
    bad = ["none.md", "other.md#no-heading", "other.md#A-heading", "#there", "docs/"]
    page.write_text(
        '<a id="here"></a>`[no](link.md) [nor\n](this.md)`\n' + " ".join(f"[text]({link})" for link in good + bad)
    )
    assert broken_links(page) == bad
    page.write_text('<img src="none.png"> <a href="other.md">there</a>')
    assert broken_links(page) == ["none.png"]


def test_glossary_index_is_complete():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == set(re.findall(r"<a id=\"([^\"]+)\">", text))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_named_files_and_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(
        r"\b(?:tests|reproduce|stepwise_lightning|docs|configs|benchmarks)/[\w/]+\.(?:py|md|yaml)\b", text
    )
    assert [name for name in files if not (ROOT / name).exists()] == []
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    examples = {"test_resume_restores_optimizer_state", "test_set"}  # a name in CONTRIBUTING.md, a folder in inputs.md
    assert [name for name in set(re.findall(r"`(test_\w+)`", text)) - examples if f"def {name}(" not in code] == []
