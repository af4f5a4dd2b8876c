"""Fixtures of the tests of spectra."""

import pytest


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures of runs, which take most of the time of a short run; module fixtures draw them."""
    from stepwise_lightning.callbacks import run_files  # not above: see pytest_configure
    from stepwise_lightning.callbacks.tensorboard import Charts

    monkeypatch.setattr(run_files, "_picture", lambda record, path: None)
    monkeypatch.setattr(Charts, "draw", lambda *arguments, **options: None)
