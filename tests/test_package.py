"""Imports of the package and the help of the command line."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import stepwise_lightning

PUBLIC = """
from stepwise_lightning import (BarlowTwins, SimCLR, VICReg, SpectralContrastive, SpectrumLogger,
                                barlow_twins_loss, simclr_loss, vicreg_loss, spectral_contrastive_loss)
from stepwise_lightning import SpectrumRecord, LastCheckpoint, LossReport, check_loss
from stepwise_lightning.spectrum import (embedding_eigenvalues, cross_correlation_eigenvalues,
                                         effective_rank, rankme, participation_ratio, alpha_req, detect_steps)
from stepwise_lightning.theory import (feature_cross_correlation, LinearBarlowTwins, ContrastiveKernelPCA,
                                       linear_kernel, rbf_kernel, laplace_kernel, relu_ntk,
                                       EmpiricalNTK, subspace_alignment, growth_matrix, growth_modes,
                                       loss_signature, saddle_value, two_tower_features)
"""


EXTRAS = ("matplotlib", "jsonargparse", "skimage", "torchvision", "tensorboard")


def import_without_extras():
    """Import the public names afresh where no extra can be imported; Lightning may have imported its own."""
    for loaded in [name for name in sys.modules if name.split(".")[0] in ("stepwise_lightning", *EXTRAS)]:
        del sys.modules[loaded]
    sys.modules |= dict.fromkeys(EXTRAS)
    exec(PUBLIC)


def test_import_needs_only_torch_and_lightning(processes):
    processes.run(import_without_extras)


WITHOUT_LIGHTNING = """
import sys
import stepwise_lightning, stepwise_lightning.plots
from stepwise_lightning import SpectrumRecord, barlow_twins_loss, check_loss, simclr_loss, vicreg_loss
from stepwise_lightning.spectrum import detect_steps, embedding_eigenvalues
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, LinearBarlowTwins
assert not {"lightning", "pytorch_lightning", "torchmetrics", "torchvision"} & set(sys.modules), sorted(sys.modules)
"""


def test_theory_losses_spectra_records_and_plots_import_without_lightning():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIGHTNING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_star_import_has_the_lightning_classes():
    names = {}
    exec("from stepwise_lightning import *", names)
    assert names["BarlowTwins"] is stepwise_lightning.BarlowTwins


@pytest.mark.parametrize("command", [["stepwise"], ["python", "-m", "stepwise_lightning"]], ids=" ".join)
def test_help_and_version(command):
    command[0] = str(Path(sys.executable).parent / command[0])
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "fit" in done.stdout and "--config barlow_twins_photos" in done.stdout
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"stepwise_lightning {version('stepwise_lightning')}"


def test_help_imports_neither_torch_nor_lightning():
    code = "import sys; sys.argv = ['stepwise', '--help']; from stepwise_lightning.__main__ import main; main()"
    code += "; assert 'lightning' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
