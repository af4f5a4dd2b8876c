"""The modes that a run has learned: their directions, what they are worth, what they look like."""

from stepwise_lightning.modes.directions import Modes
from stepwise_lightning.modes.portraits import ModePortraits, describe_modes
from stepwise_lightning.modes.projector import write_projector
from stepwise_lightning.modes.worth import mode_worth

__all__ = ["ModePortraits", "Modes", "describe_modes", "mode_worth", "write_projector"]
