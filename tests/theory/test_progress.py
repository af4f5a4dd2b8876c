"""Long computations of theory show their progress on standard error, short ones nothing."""

import io
import sys

import pytest
import torch
from torch import nn

from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, progress, rbf_kernel

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
LAYERWISE = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 100))
PER_SAMPLE = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 20))
for layer in PER_SAMPLE:
    layer.register_forward_hook(lambda *_: None)


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 1e-6)
    monkeypatch.setattr(progress, "_LINE_INTERVAL", 0.0)


def test_short_work_prints_nothing(capsys):
    EmpiricalNTK(LAYERWISE)(X, X)
    ContrastiveKernelPCA(rbf_kernel, 2).fit(X, X + 0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("network", "last"), [(LAYERWISE, "400 of 400 gradients"), (PER_SAMPLE, "20 of 20 outputs")])
def test_tangent_kernel_prints_plain_lines_without_a_terminal(network, last, no_delay, capsys):
    EmpiricalNTK(network)(X, X)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert lines[-1].startswith(f"tangent kernel: {last}, 00:") and lines[-1].endswith(" left")
    assert output.out == "" and "\r" not in output.err and "\x1b" not in output.err


@pytest.mark.parametrize("max_bytes", [2000, 2**30])
def test_counted_gradients_match_the_total_in_blocks(max_bytes, no_delay, capsys):
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 10))
    for y in (X, X[1:]):
        EmpiricalNTK(network, max_bytes=max_bytes)(X, y)
        done, total = capsys.readouterr().err.splitlines()[-1].split()[2:5:2]
        assert done == total


def test_terminal_shows_a_bar(no_delay, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress_bar("tangent kernel", "gradient", 3) as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
    assert "\rtangent kernel: 100%" in terminal.getvalue()


def test_progress_of_kernel_pca_can_be_disabled(no_delay, capsys):
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    for shown in (True, False):
        ContrastiveKernelPCA(rbf_kernel, 2, progress=shown).fit(x, x + 0.1)
        assert ("kernel modes: 1 products" in capsys.readouterr().err) == shown
