"""Mutation tests: a device mistake in one line of a copy of the package makes a device test fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = Path(__file__).parent
PACKAGE = DEVICES.parents[1] / "stepwise_lightning"
WEIGHTS, CPU_RUN = "barlow_twins-cuda", "cpu_run"
# By mistake: the test that notices it, a file, its line, and the line with the mistake.
MISTAKES = {
    "no device in zeros": (
        "attributes-cuda", "modes/attributes.py", "c.new_zeros(len(names), c.shape[1])",
        "torch.zeros(len(names), c.shape[1], dtype=c.dtype)",
    ),
    "no map_location": ("kernel_model", "theory/contrastive.py", "map_location=float64_device(device), ", ""),
    "numpy": ("measure-cuda", "spectrum/measures.py", "eigenvalues.cpu()", "torch.from_numpy(eigenvalues.numpy())"),
    "CPU generator": ("crop_pairs-cuda", "data/views.py", 'with torch.device("cpu"):', "with images.device:"),
    "float64 on mps": ("Modes-mps", "modes/directions.py", 'as_float64(z, "the embeddings")', "z.double()"),
    "weights drawn on the device": ("weights_do_not_depend", "seeding.py", ', torch.device("cpu"):', ":"),
    "blocking copy in a step": (
        WEIGHTS, "modules/joint_embedding.py", "(self(view)))", "(self(view.cpu().to(view.device))))",
    ),
    "mask in a step": (
        WEIGHTS, "losses.py", "return matrix - matrix.diagonal().diag_embed()",
        "return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]",
    ),
    "item in a step": (
        WEIGHTS, "modules/joint_embedding.py", "batch, now=writing)", "batch, now=writing or loss.item() > 1e9)",
    ),
    "constructor in capture": (
        WEIGHTS, "features/capture.py", "return output.detach().reshape(len(output), -1).clone()",
        "return torch.empty(len(output), output[0].numel()).copy_(output.detach().flatten(1))",
    ),
    "CUDA in a CPU run": (CPU_RUN, "runs/resume.py", "cuda.is_initialized() else", "cuda.is_available() else"),
    "pinned memory": (
        CPU_RUN, "data/two_view_datamodule.py", 'self._device.type == "cuda", ', "torch.cuda.is_available(), ",
    ),
}  # fmt: skip


def status_of_tests(folder, words):
    """Return the exit status of the device tests with these words, with the package in a folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", DEVICES, "-k", words]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}).returncode


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_replaces_one_line(mistake):
    _, name, line, _ = MISTAKES[mistake]
    assert (PACKAGE / name).read_text("utf-8").count(line) == 1


@pytest.mark.slow
def test_unchanged_copy_of_the_package_passes(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    assert status_of_tests(tmp_path, " or ".join({test for test, *_ in MISTAKES.values()})) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_device_mistake_is_noticed(mistake, tmp_path):
    test, name, line, wrong = MISTAKES[mistake]
    file = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name) / name
    file.write_text(file.read_text("utf-8").replace(line, wrong), "utf-8")
    assert status_of_tests(tmp_path, test) == 1
