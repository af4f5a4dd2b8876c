"""Files of a release agree: version, changelog, citation, badge, workflows, notebooks and the versions of the site."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def release(tmp_path):
    """Return a function that runs the release script in a copy of the files that it changes."""
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments):
        command = [sys.executable, str(ROOT / ".github/release.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_release_has_notes_a_dated_citation_and_absolute_links(release, tmp_path):
    tag = f"v{PROJECT['version']}"
    assert release("prepare", "2030-01-31").returncode == 0
    assert release("check", tag).returncode == 0
    assert "differs from version" in release("check", "v0.0.1").stderr
    assert "\ndate-released: 2030-01-31\n" in (tmp_path / "CITATION.cff").read_text(encoding="utf-8")
    notes = release("notes").stdout
    assert "### Added" in notes and "\n## " not in f"\n{notes}"
    assert f"]({PROJECT['urls']['Source']}/blob/{tag}/docs/deprecation.md)" in notes and "](docs/" not in notes
    assert release("links", tag).returncode == 0
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    assert all(link.startswith("https://") for link in links)
    assert f"{PROJECT['urls']['Source']}/blob/{tag}/docs/start.md#install" in links
    (tmp_path / "CHANGELOG.md").write_text(f"## {PROJECT['version']}, unreleased\n", encoding="utf-8")
    assert "run release.py prepare DATE" in release("check", tag).stderr


def test_badge_has_the_oldest_python():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"[![Python ≥ {oldest}]" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_pin_actions_to_commits_and_have_a_concurrency_group(path):
    text = path.read_text(encoding="utf-8")
    actions = re.findall(r"uses: (.*)", text)
    assert actions and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action) for action in actions)
    assert re.search(r"^concurrency:\n  group: ", text, re.MULTILINE)


def test_downloaded_notebook_works_outside_the_site(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import notebooks

    links = '<p class="notebook"><a href="x">open in Colab</a></p>\n'
    text = f"# Title\n\n{links}\n[a](../glossary.md#mode) [b](#here) [c](https://arxiv.org)"
    page = {
        "cells": [{"cell_type": "markdown", "source": text}, {"cell_type": "code", "source": "[d](e)"}],
        "nbformat": 4,
    }
    first, markdown, code = notebooks.standalone(page, Path("docs/tutorials"))["cells"]
    assert "%pip install -q stepwise_lightning" in first["source"] and code["source"] == "[d](e)"
    glossary = f"{PROJECT['urls']['Source']}/blob/main/docs/glossary.md#mode"
    assert markdown["source"] == f"# Title\n\n[a]({glossary}) [b](#here) [c](https://arxiv.org)"
    monkeypatch.setattr(notebooks, "VERSION", "0.3.0")
    of_release = notebooks.standalone(page, Path("docs/tutorials"))["cells"][1]["source"]
    assert f"[a]({glossary.replace('blob/main', 'blob/v0.3.0')})" in of_release


@pytest.mark.slow
def test_deployed_site_has_all_versions(tmp_path):
    (tmp_path / "site").mkdir()
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "remote"], check=True)
    for version in ("main", "0.9.0", "0.10.0", "0.9.1", "0.11.0rc1", "branch", "main"):
        (tmp_path / "site/index.html").write_text(version)
        command = [ROOT / ".github/deploy_docs", tmp_path / "site", version, tmp_path / "remote"]
        subprocess.run(command, check=True)

    def show(name):
        command = ["git", "-C", tmp_path / "remote", "show", f"gh-pages:{name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert show("stable/index.html") == show("0.10.0/index.html") == "0.10.0"
    assert show("main/index.html") == "main" and show("0.9.1/index.html") == "0.9.1"
    assert "url=stable/index.html" in show("index.html")
    assert re.findall(r'href="(.*?)/', show("versions.html")) == [
        *("stable", "main", "branch", "0.11.0rc1", "0.10.0", "0.9.1", "0.9.0")
    ]
