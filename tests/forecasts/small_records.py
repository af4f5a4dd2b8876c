"""Records of modes that rise or decay."""

import torch

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.spectrum.schedule import log_spaced_steps

STEPS = torch.tensor(log_spaced_steps(400, 60))


def record_of(*modes, losses=None, matrix="cross_correlation"):
    """Return a record of modes, functions of the step."""
    steps = STEPS.double()
    values = torch.stack([mode(steps) for mode in modes], 1)
    return SpectrumRecord.of(steps * 0.01, values.sort(1, descending=True).values, losses, matrix, STEPS)


def rising(at, rate=0.1, start=1e-6):
    """Return a mode that grows to 1, with half of it at step ``at``."""
    return lambda steps: torch.sigmoid(rate * (steps - at)) + start


def decaying(rate, start=1e-6):
    return lambda steps: start * (-rate * steps).exp()
