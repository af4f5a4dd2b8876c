"""Growth of hidden eigenvalues at the steps of the embedding."""

from types import SimpleNamespace

import pytest
import torch

from reproduce.figures.hidden_spectra import HIDDEN, _growth_at_other_seeds, _growth_at_steps
from stepwise_lightning import SpectrumRecord

TIMES = torch.logspace(-2, 1, 400, dtype=torch.float64)
STEPS = torch.tensor([0.05, 0.2, 1.0, 4.0], dtype=torch.float64)


def run_with(rises, factor=3.0):
    """Return a run with steps at STEPS, whose k-th hidden eigenvalue grows by a factor at the k-th of ``rises``."""
    late = torch.sigmoid(60 * (TIMES[:, None].log() - torch.tensor(rises, dtype=torch.float64).log()))
    hidden = torch.tensor([8.0, 4.0, 2.0, 1.0]) * factor**late
    record = SpectrumRecord.of(TIMES, hidden, matrix=HIDDEN)
    return SimpleNamespace(record=record, steps=SimpleNamespace(num_learned=torch.tensor([0, 4]), step_times=STEPS))


def test_growth_at_the_steps_is_found_there_only():
    growth = _growth_at_steps(run_with([0.05, 0.2, 1.0, 4.0]))
    assert growth["growth_at_steps"] == pytest.approx(3.0, rel=1e-3)
    assert growth["growth_at_other_steps"] == pytest.approx(1.0, rel=1e-3)
    assert growth["growth_evenly"] == pytest.approx(3.0 ** (2 / 3), rel=1e-3)  # the middle step is not evenly spaced


@pytest.mark.parametrize("rises", [[0.05, 4.0, 1.0, 0.2], [0.05, 0.4, 2.0, 8.0]], ids=["other order", "twice as late"])
def test_growth_at_other_times_is_not_growth_at_the_steps(rises):
    assert _growth_at_steps(run_with(rises))["growth_at_steps"] < 1.5


def test_steps_of_other_seeds():
    first, second = run_with([0.05, 0.2, 1.0, 4.0]), run_with([0.05, 0.2, 1.0, 4.0])
    assert _growth_at_other_seeds([first]) is None
    assert _growth_at_other_seeds([first, second]) == pytest.approx(3.0, rel=1e-3)
    second.steps.step_times = 2 * STEPS
    second.record = run_with([0.1, 0.4, 2.0, 8.0]).record
    assert _growth_at_other_seeds([first, second]) == pytest.approx(1.0, rel=1e-2)
