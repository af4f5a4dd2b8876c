"""Training on a pretend GPU: final weights of the CPU bit for bit, and the number of waits of one step."""

from collections import Counter

import lightning as L
import pytest
import torch
from pretend_gpu import PretendGPU, is_on_device
from torch.utils.data import DataLoader, Subset

from stepwise_lightning import (
    AcceleratedBarlowTwins,
    BarlowTwins,
    Encoder,
    LastCheckpoint,
    OnlineKNN,
    OnlineLinearProbe,
    SimCLR,
    SpectrumLogger,
    TwoViewDataModule,
    VICReg,
)

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False}
METHODS = {
    "barlow_twins": (BarlowTwins, ANALYTICAL),
    "vicreg": (VICReg, {}),
    "simclr": (SimCLR, {}),
    "lyapunov": (AcceleratedBarlowTwins, {"acceleration": "lyapunov"}),
}
# All waits of a step that neither measures, logs nor saves, each for a copy queued before the operations of the step.
WAITS = {
    ("event", "modules/divergence.py __call__"): 1,  # loss of the previous step
    ("event", "callbacks/online_evaluation.py on_train_batch_end"): 1,  # labels: how many are known
}


class FewNeighbours(TwoViewDataModule):
    """Photographs of which k-NN uses 64, which saves most of the time of a run."""

    def labelled_train_dataloader(self):
        return DataLoader(Subset(super().labelled_train_dataloader().dataset, range(64)), batch_size=16)


class WaitsOfSteps(L.Callback):
    """Count waits from the start of one batch to the start of the next."""

    def __init__(self, gpu):
        self.gpu, self.steps = gpu, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.gpu.waits = self.steps[trainer.global_step] = Counter()


def train(folder, method, accelerator, *callbacks):
    """Return the record and the final weights after six steps."""
    kind, settings = METHODS[method]
    encoder = Encoder(4, hidden_features=8, projector_depth=2, alpha=1e-2, bias_norm=1.0)
    module = kind(encoder, 1e-3, momentum=0.9, **settings)
    spectra = SpectrumLogger(["encoder.backbone"], num_points=2, keep_embeddings=True)
    trainer = L.Trainer(
        max_steps=6, accelerator=accelerator, devices=1, logger=False, enable_progress_bar=False, val_check_interval=5,
        callbacks=[spectra, OnlineLinearProbe(), OnlineKNN(k=5), LastCheckpoint(3), *callbacks],
        log_every_n_steps=100, default_root_dir=folder, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(module, FewNeighbours("photos", global_batch_size=16, image_size=16, num_probe_pairs=32))
    weights = {f"weights of {name}": p.detach().cpu() for name, p in module.named_parameters()}
    return spectra.record.arrays() | weights


RUNS = [
    pytest.param(method, kind, marks=[] if (method, kind) in (("barlow_twins", "cuda"), ("vicreg", "mps")) else slow)
    for slow in [pytest.mark.slow]
    for method in METHODS
    for kind in ("cuda", "mps")
]


@pytest.mark.parametrize(("method", "kind"), RUNS)
def test_training_on_a_device_ends_with_the_weights_of_the_cpu(method, kind, tmp_path):
    expected = train(tmp_path / "cpu", method, "cpu")
    with PretendGPU(kind) as gpu:
        waits = WaitsOfSteps(gpu)
        found = train(tmp_path / "gpu", method, "gpu" if kind == "cuda" else "mps", waits)
        assert not any(map(is_on_device, found.values()))
    for name, value in expected.items():
        # eigenvalues are rounded differently by memory layout
        tolerance = {"rtol": 0, "atol": 0} if name.startswith("weights") else {"rtol": 1e-6, "atol": 1e-12}
        message = (name + ": {}").format
        torch.testing.assert_close(found[name], value, **tolerance, equal_nan=True, msg=message)
    assert not gpu.draws  # otherwise a resumed run needs the state of the device's generator
    if method == "barlow_twins" and kind == "cuda":
        assert dict(waits.steps[3]) == WAITS
