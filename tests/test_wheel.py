"""A wheel of this repository, installed into an environment that has torch, trains in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from tiny_runs import CONFIG, write_images

import stepwise_lightning

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "stepwise_lightning", "configs")

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """Run a command that must succeed, without this checkout on its path, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder of executables of an environment with the packages installed here and the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # copied, because setuptools writes to the source folder
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / "source").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "dist", folder / "source", cwd=folder)
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    paths = {"base": str(environment), "platbase": str(environment)}
    (Path(sysconfig.get_path("purelib", vars=paths)) / "existing.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python, (wheel,) = environment / "bin" / "python", (folder / "dist").iterdir()
    into = (*pip, "--python", python, "install", "--no-index")
    run(*into, "--no-deps", "--force-reinstall", wheel, cwd=folder)  # also if another version is installed here
    run(*into, wheel, cwd=folder)  # without an index: the environment must satisfy the requirements
    return python.parent


def test_wheel_is_imported_with_its_version(installed, tmp_path):
    code = "import stepwise_lightning as s; print(s.__file__); print(s.__version__)"
    file, version = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == stepwise_lightning.__version__
    assert (Path(file).parent / "py.typed").is_file() and (Path(file).parent / "__init__.pyi").is_file()


def test_command_trains_in_an_empty_folder(installed, tmp_path):
    write_images(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    run(installed / "stepwise", "fit", "--config", "tiny.yaml", cwd=tmp_path)
    code = (
        "from stepwise_lightning import SpectrumRecord\n"
        "print(SpectrumRecord.load('runs/lightning_logs/version_0').steps.tolist())"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "[0, 1, 2]\n"
