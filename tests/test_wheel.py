"""The distributions pass the checks of a release, and the wheel trains in an empty environment; needs the index."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_tutorials import cells

import stepwise_lightning

ROOT = Path(__file__).parent.parent
SOURCES = (
    *(
        ".github",
        ".gitignore",
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
    ),
    *("README.md", "configs", "constraints.txt", "docs", "pyproject.toml", "stepwise_lightning", "tests"),
)

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """Run a command that must succeed, without this checkout on its path, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the wheel that ``make dist`` builds from the sdist and checks."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    run("make", "dist", f"PYTHON={sys.executable}", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return the folder of executables of an environment with the wheel and its requirements only."""
    folder = tmp_path_factory.mktemp("wheel") / "environment"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    install = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*install, "-c", ROOT / "constraints.txt", f"{wheel}[exchange]", cwd=folder.parent)
    yield folder / "bin"
    shutil.rmtree(folder)  # several gigabytes


def test_wheel_is_imported_with_its_version(installed, tmp_path):
    code = "import stepwise_lightning as s; print(s.__file__); print(s.__version__)"
    file, version = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == stepwise_lightning.__version__
    assert (Path(file).parent / "py.typed").is_file() and (Path(file).parent / "__init__.pyi").is_file()


def test_wheel_trains_exports_and_reloads_in_an_empty_folder(installed, tmp_path):
    run(installed / "stepwise", "fit", "--config", "barlow_twins_photos", "--trainer.max_steps", 20, cwd=tmp_path)
    folder = "runs/barlow_twins_photos/version_0"
    output = run(installed / "stepwise", "export", folder, "--out", "weights.safetensors", cwd=tmp_path)
    assert "| steps | 20, seed 0 |" in (tmp_path / "weights.md").read_text(encoding="utf-8")
    code = textwrap.dedent(output.partition("\n\n")[2]) + textwrap.dedent(f"""
        from stepwise_lightning import SpectrumRecord, load_encoder
        x = torch.randn(2, 3, 24, 24)
        assert torch.equal(network.eval()(x), load_encoder("{folder}").backbone.network(x))
        table = SpectrumRecord.load("{folder}").to_dataframe()
        print(table.step.max())
    """)
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "20\n"


def test_code_of_a_tutorial_runs_in_an_empty_folder(installed, tmp_path):
    code = "\n".join(cells(ROOT / "docs/tutorials/predict_train_overlay.md"))
    (tmp_path / "tutorial.py").write_text(f"import matplotlib\nmatplotlib.use('agg')\n{code}", encoding="utf-8")
    run(installed / "python", tmp_path / "tutorial.py", cwd=tmp_path)
