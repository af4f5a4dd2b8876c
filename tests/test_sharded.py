"""Fully sharded data parallelism (``fully_shard``) with two processes, and settings that are not supported."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from stepwise_lightning import BarlowTwins, ForecastLogger, LastCheckpoint, OnlineLinearProbe, SpectrumLogger
from stepwise_lightning.modules.divergence import check_weights
from stepwise_lightning.runs import AtomicCheckpointIO
from stepwise_lightning.runs.strategies import check_strategy
from stepwise_lightning.sync_batchnorm import SyncBatchNorm

PAIRS, STEPS = 12, 6

sharded_on_cpus = pytest.mark.skipif(torch.__version__ < (2, 11), reason="fully_shard of torch 2.6 fails on CPUs")


class Sharded(BarlowTwins):
    """Module whose encoder is sharded, layer by layer."""

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (self.encoder[0], self.encoder):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Shards(Dataset):
    """Share of a rank of global batches of two views; an epoch has two batches."""

    def __init__(self, trainer):
        self.batches = torch.randn(2, 2, PAIRS, 6, generator=torch.Generator().manual_seed(1))
        size = PAIRS // trainer.world_size
        self.rows = slice(trainer.global_rank * size, (trainer.global_rank + 1) * size)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return tuple(self.batches[index][:, self.rows])


def fit(folder, strategy, steps=STEPS, checkpoint=None, probe="batch"):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    module = Sharded(encoder, 0.1, normalize=False, momentum=0.5)
    spectra = SpectrumLogger(watch=["encoder.0"], num_points=100, probe=probe)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1 if strategy == "auto" else 2, strategy=strategy,
        callbacks=[spectra, ForecastLogger(), LastCheckpoint(4)], plugins=[AtomicCheckpointIO()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Shards(trainer), batch_size=None), ckpt_path=checkpoint)
    weights = {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in module.named_parameters()
    }
    return spectra.record.arrays(), weights, module


def two_ranks(folder, probe):
    """Return the results of a resumed run, its saved weights, and the messages of refused runs and NaN weights."""

    def strategy(*sizes, several_files=False):
        return ModelParallelStrategy(*sizes, save_distributed_checkpoint=several_files)

    messages = []
    for refused in (strategy(1, 2), strategy(2, 1, several_files=True)):
        with pytest.raises(ValueError) as error:
            fit(f"{folder}/refused", refused)
        messages.append(str(error.value))
    fit(folder, strategy(2, 1), steps=4, probe=probe)
    last = f"{folder}/stepwise_runs/version_0/checkpoints/last.ckpt"
    arrays, weights, module = fit(folder, strategy(2, 1), checkpoint=last, probe=probe)
    if module.global_rank == 1:
        module.encoder[0].weight.detach().to_local().fill_(math.nan)
    with pytest.raises(FloatingPointError) as error:
        check_weights(module)
    messages.append(str(error.value))
    return arrays, weights, torch.load(last, weights_only=True)["state_dict"], messages


@sharded_on_cpus
@pytest.mark.parametrize("kind", ["batch", pytest.param("fixed", marks=pytest.mark.slow)])
def test_resumed_sharded_run_equals_a_run_in_one_process(kind, tmp_path, processes):
    probe = "batch" if kind == "batch" else tuple(torch.randn(2, PAIRS, 6, generator=torch.Generator().manual_seed(2)))
    expected, one, _ = fit(tmp_path / "one", "auto", probe=probe)
    for rank, (arrays, weights, saved, messages) in enumerate(
        processes.run_ranks(2, two_ranks, str(tmp_path / "two"), probe)
    ):
        torch.testing.assert_close(weights, one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(saved, one, rtol=1e-4, atol=1e-6)
        if rank == 0:
            torch.testing.assert_close(arrays, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert "tensor_parallel_size 2: use ModelParallelStrategy(data_parallel_size=2" in messages[0]
        assert "use ModelParallelStrategy(save_distributed_checkpoint=False)" in messages[1]
        assert f"the weights at step {STEPS} are not finite" in messages[2]  # only the shard of rank 1 has NaN


class Labelled(Shards):
    """Batches in which only the first rank has labels, for training (two views) or evaluation (one view)."""

    def __init__(self, trainer, views=2):
        super().__init__(trainer)
        self.views = views
        self.labels = torch.where(torch.arange(PAIRS) < 4, torch.arange(PAIRS) % 2, -1)

    def __getitem__(self, index):
        return *super().__getitem__(index)[: self.views], self.labels[self.rows]


def evaluate(strategy):
    """Return the accuracy of a probe and its weights."""
    torch.manual_seed(0)
    module = Sharded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 0.1, normalize=False)
    probe = OnlineLinearProbe("encoder.0", num_classes=2, learning_rate=0.1)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", devices=1 if strategy == "auto" else 2, strategy=strategy, callbacks=[probe],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, *(DataLoader(Labelled(trainer, views), batch_size=None) for views in (2, 1)))
    return trainer.callback_metrics["val/probe_top1"], probe.state_dict()["probe"]


def evaluate_sharded():
    return evaluate(ModelParallelStrategy(2, 1, save_distributed_checkpoint=False))


@sharded_on_cpus
def test_evaluation_of_a_sharded_module_with_labels_on_one_rank(processes):
    expected = evaluate("auto")
    for found in processes.run_ranks(2, evaluate_sharded, timeout=60):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_unsupported_strategies_raise(strategy):
    # DeepSpeed is not installed, and Lightning's FSDPStrategy needs a GPU.
    with pytest.raises(ValueError, match=f"{strategy.__name__} is not supported, .*: use strategy='ddp', or ModelPar"):
        check_strategy(SimpleNamespace(strategy=object.__new__(strategy)))


@pytest.mark.parametrize("settings", [{"sync_batchnorm": True}, {"plugins": [SyncBatchNorm()]}])
def test_batch_normalisation_for_gpus_raises_on_cpus(settings):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, **settings)
    for encoder, fails in ((nn.Linear(3, 2), False), (nn.BatchNorm1d(3), "plugins" not in settings)):
        trainer.strategy.connect(BarlowTwins(encoder, 0.1))
        with pytest.raises(ValueError, match="set sync_batchnorm=False and plugins") if fails else nullcontext():
            check_strategy(trainer)
