"""Random numbers of an Apple GPU, with a replaced generator: resumed and unchanged by measurements."""

import pytest
import torch
from torch import nn

from stepwise_lightning.features import capture
from stepwise_lightning.runs.resume import random_state, set_random_state


@pytest.fixture
def generator(monkeypatch):
    """Replace the generator of an Apple GPU by one on the CPU."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: generator.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: generator.set_state(state))
    return generator


def test_random_state_includes_the_apple_gpu(generator):
    state = random_state()
    first = torch.rand(3, generator=generator)
    set_random_state(state)
    assert torch.equal(torch.rand(3, generator=generator), first)
    set_random_state({name: value for name, value in state.items() if name != "mps"})  # of a run without this GPU
    assert not torch.equal(torch.rand(3, generator=generator), first)


def test_measurements_restore_the_generator_of_the_apple_gpu(generator):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(1, generator=generator)

    before = generator.get_state()
    capture(Noisy(3, 2), [torch.ones(2, 3)], [""])
    assert torch.equal(generator.get_state(), before)
