"""A notebook asks for a picture by ``_repr_png_``: figures have one without pyplot, which would make it for them."""

import torch

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.plots import trajectories_figure


def test_a_figure_gives_its_picture():
    times = torch.linspace(0, 40, 41)
    figure = trajectories_figure(SpectrumRecord.of(times, torch.sigmoid(times - 20)[:, None]))
    assert figure._repr_png_().startswith(b"\x89PNG")
