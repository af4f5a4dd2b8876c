"""Provenance records the commit of this package, not that of the surrounding repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stepwise_lightning

PACKAGE = Path(stepwise_lightning.__file__).parent
GIT = {f"GIT_{who}_{part}": "nobody@example.org" for who in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}


def git(folder, *arguments):
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], env=os.environ | GIT, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def repository(folder):
    """Create a repository with one commit and return the commit."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "theirs.py").write_text("1\n")
    (folder / ".gitignore").write_text(".venv\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "theirs")
    return git(folder, "rev-parse", "HEAD")


def copy(folder):
    return shutil.copytree(PACKAGE, folder / "stepwise_lightning", ignore=shutil.ignore_patterns("__pycache__"))


def recorded(packages, directory, **environment):
    """Return both commits that a process records which imports the package from ``packages``."""
    code = "import json; from stepwise_lightning.runs import provenance; print(json.dumps(provenance()))"
    env = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    return record["commit"], record["working_directory_commit"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [".venv/lib/site-packages", "lib"])
def test_package_installed_inside_another_repository(place, tmp_path):
    theirs = repository(tmp_path / "theirs")
    packages = tmp_path / "theirs" / place
    copy(packages)
    ours, working = recorded(packages, tmp_path / "theirs")
    ignored = place.startswith(".venv")
    assert ours is None and working == theirs + ("" if ignored else " (with uncommitted changes)")


@pytest.mark.slow
def test_clone_used_from_another_repository(tmp_path):
    theirs = repository(tmp_path / "theirs")
    repository(tmp_path / "clone")
    copy(tmp_path / "clone")
    git(tmp_path / "clone", "add", ".")
    git(tmp_path / "clone", "commit", "--quiet", "--message", "ours")
    ours = git(tmp_path / "clone", "rev-parse", "HEAD")
    (tmp_path / "clone" / ".git" / "info" / "exclude").write_text("__pycache__\n")
    (tmp_path / "clone" / "reproduce" / "results").mkdir(parents=True)
    (tmp_path / "clone" / "reproduce" / "results" / "record.json").touch()
    assert recorded(tmp_path / "clone", tmp_path / "theirs") == (ours, theirs)
    (tmp_path / "clone" / "reproduce" / "changed.py").touch()
    assert recorded(tmp_path / "clone", tmp_path / "theirs") == (ours + " (with uncommitted changes)", theirs)
    hook = {"GIT_DIR": str(tmp_path / "theirs/.git"), "GIT_WORK_TREE": str(tmp_path / "theirs")}
    assert recorded(tmp_path / "clone", tmp_path, **hook) == (ours + " (with uncommitted changes)", None)


@pytest.mark.slow
def test_without_repository_and_without_git(tmp_path):
    copy(tmp_path)
    assert recorded(tmp_path, tmp_path) == (None, None)
    assert recorded(tmp_path, tmp_path, PATH="") == (None, None)
