"""Predict, train and watch joint-embedding models that learn one dimension at a time."""

from importlib.metadata import version

from stepwise_lightning.data import FixedCropPairs, TwoViewDataModule
from stepwise_lightning.encoders import MLP, Encoder, LinearEncoder, Projector, ResNet, scale_last_layer
from stepwise_lightning.evaluation import OnlineKNN, OnlineLinearProbe
from stepwise_lightning.losses import barlow_twins_loss, simclr_loss, vicreg_loss
from stepwise_lightning.modules import BarlowTwins, SimCLR, VICReg
from stepwise_lightning.record import SpectrumRecord
from stepwise_lightning.runs import LastCheckpoint
from stepwise_lightning.spectrum.logger import SpectrumLogger

__all__ = [
    "BarlowTwins",
    "Encoder",
    "FixedCropPairs",
    "LastCheckpoint",
    "LinearEncoder",
    "MLP",
    "OnlineKNN",
    "OnlineLinearProbe",
    "Projector",
    "ResNet",
    "SimCLR",
    "SpectrumLogger",
    "SpectrumRecord",
    "TwoViewDataModule",
    "VICReg",
    "barlow_twins_loss",
    "scale_last_layer",
    "simclr_loss",
    "vicreg_loss",
]
__version__ = version("stepwise_lightning")
