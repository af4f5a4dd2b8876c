"""Learned modes of a run: directions, descriptions and accuracy."""

from stepwise_lightning.modes.describe import describe_modes
from stepwise_lightning.modes.description import ModeDescription
from stepwise_lightning.modes.directions import Modes
from stepwise_lightning.modes.projector import write_projector
from stepwise_lightning.modes.worth import mode_worth

__all__ = ["ModeDescription", "Modes", "describe_modes", "mode_worth", "write_projector"]
