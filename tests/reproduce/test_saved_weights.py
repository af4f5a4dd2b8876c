"""Weights that the runs of the full profile save."""

import torch
from tiny_runs import changed, stepwise, write_images

from reproduce.networks.runs import Run
from reproduce.networks.training import PROFILES
from reproduce.options import new_parser
from stepwise_lightning.spectrum.schedule import log_spaced_steps


def test_full_profile_saves_weights_at_log_spaced_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    run = Run("vicreg", "small", 0, new_parser("test", "", PROFILES).parse_args(["--profile", "full", "--out", "."]))
    callback = [f"--{name}={value}" for name, value in run.settings().items() if name.startswith("trainer.callbacks")]
    assert "--trainer.callbacks+=reproduce.networks.weights.LogSpacedWeights" in callback
    last = "stepwise_lightning.LastCheckpoint"
    for steps, checkpoint in ((8, "none"), (20, "last")):
        extra = ["--ckpt_path=last"] if checkpoint == "last" else []
        stepwise("fit", f"--trainer.callbacks+={last}", *callback, *extra, config=changed({"trainer.max_steps": steps}))
    assert set(run.saved_steps()) == {*log_spaced_steps(8, 100), *log_spaced_steps(20, 100)} - {0}
    weights = torch.load(run.weights / "step=20.ckpt", weights_only=True)
    assert "state_dict" in weights and "optimizer_states" not in weights
