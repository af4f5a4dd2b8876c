"""Fixtures of the tests of spectra."""

import pytest

from stepwise_lightning.callbacks import run_files
from stepwise_lightning.callbacks.tensorboard import Charts


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures of runs, which take most of the time of a short run; module fixtures draw them."""
    monkeypatch.setattr(run_files, "_picture", lambda record, path: None)
    monkeypatch.setattr(Charts, "draw", lambda *arguments, **options: None)
