"""The modes that a run has learned: their directions, what they are worth, what they look like."""

from stepwise_lightning.modes.directions import Modes
from stepwise_lightning.modes.worth import mode_worth

__all__ = ["Modes", "mode_worth"]
