"""Modules in a Trainer: logged terms, learning-rate schedule, divergence, and checkpoints."""

import math
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import stepwise, write_images

from stepwise_lightning import BarlowTwins, JointEmbedding, SimCLR, SpectralContrastive, VICReg
from stepwise_lightning.modules.joint_embedding import rate_factor
from stepwise_lightning.sync_batchnorm import SyncBatchNorm

TERMS = {
    BarlowTwins: {"on_diagonal", "off_diagonal"},
    SimCLR: {"alignment", "uniformity"},
    SpectralContrastive: {"alignment", "repulsion"},
    VICReg: {"invariance", "variance", "covariance"},
}


def pairs(steps, bad_step=None):
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(2, 8, 6, generator=generator)) for _ in range(steps)]
    if bad_step is not None:
        batches[bad_step][0][0, 0] = math.nan
    return torch.utils.data.DataLoader(batches, batch_size=None)


def fit(module, directory, steps, *, loader=None, callbacks=(), **trainer):
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=CSVLogger(directory, name="run"), callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks), enable_model_summary=False, enable_progress_bar=False,
        default_root_dir=directory, **{"log_every_n_steps": 1, **trainer},
    )  # fmt: skip
    trainer.fit(module, loader or pairs(steps))
    return trainer


def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Linear(6, 3)


@pytest.mark.parametrize("method", TERMS)
def test_logged_terms_sum_to_the_loss(method, tmp_path):
    trainer = fit(method(encoder(), learning_rate=1e-3), tmp_path, 3)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged.keys() == {"train/loss"} | {f"train/{term}" for term in TERMS[method]}
    assert sum(logged[f"train/{term}"] for term in TERMS[method]) == pytest.approx(logged["train/loss"], rel=1e-6)


def test_log_every_n_steps_0_disables_logging(tmp_path):
    assert fit(VICReg(encoder(), learning_rate=1e-3), tmp_path, 2, log_every_n_steps=0).logged_metrics == {}


def test_optimiser_follows_warm_up_and_cosine(tmp_path):
    rates = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = SimCLR(encoder(), learning_rate=0.2, momentum=0.9, weight_decay=1e-4, warmup_steps=4, cosine=True)
    optimizer = fit(module, tmp_path, 10, callbacks=[Record()]).optimizers[0]
    assert rates == pytest.approx([0.2 * rate_factor(step, 4, 10) for step in range(10)])
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2]) and rates[4] == pytest.approx(0.2)
    assert rates[7] == pytest.approx(0.1)  # half-way along the cosine
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_rate_factor():
    assert [rate_factor(step, 0, math.inf) for step in (0, 10**6)] == [1, 1]
    assert [rate_factor(step, 2, math.inf) for step in range(4)] == [0.5, 1, 1, 1]
    assert rate_factor(100, 0, 100) == pytest.approx(0) and rate_factor(101, 0, 100) == pytest.approx(0)
    assert rate_factor(5, 5, 5) == 1  # no steps remain for the cosine


def test_cosine_requires_a_last_step(tmp_path):
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        fit(SimCLR(encoder(), learning_rate=0.1, cosine=True), tmp_path, -1, max_epochs=-1, loader=pairs(2))


def test_negative_warm_up_raises():
    with pytest.raises(ValueError, match="warmup_steps must be finite and at least 0, got -1"):
        SimCLR(encoder(), learning_rate=0.1, warmup_steps=-1)


def test_divergence_stops_training_and_keeps_the_last_finite_checkpoint(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
    module = BarlowTwins(encoder(), learning_rate=1e3, normalize=False)
    with pytest.raises(FloatingPointError, match=r"loss at step \d+ is (nan|inf); .*lower.*1000") as error:
        fit(module, tmp_path, 50, callbacks=[saved])
    assert "\n" not in str(error.value)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_batch_with_nan_is_reported_as_the_cause(tmp_path):
    with pytest.raises(
        FloatingPointError, match="loss at step 2 is nan; the batch contains values that are not finite: check the data"
    ):
        fit(VICReg(encoder(), learning_rate=1e-3), tmp_path, 5, loader=pairs(5, bad_step=2))


def test_nan_weights_after_the_last_step_raise(tmp_path):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3:
                module.encoder.weight.data.fill_(math.nan)

    with pytest.raises(FloatingPointError, match="weights at step 3 are not finite; .*lower learning_rate"):
        fit(VICReg(encoder(), learning_rate=1e-3), tmp_path, 3, callbacks=[Break()])


@pytest.mark.parametrize("method", [BarlowTwins, *(pytest.param(m, marks=pytest.mark.slow) for m in (SimCLR, VICReg))])
def test_checkpoints_contain_plain_values_and_restore_the_module(method, tmp_path):
    trainer = fit(method(encoder(), learning_rate=1e-3, warmup_steps=2, cosine=True), tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert all(
        value is None or isinstance(value, (bool, int, float, str)) for value in checkpoint["hyper_parameters"].values()
    )
    again = method.load_from_checkpoint(tmp_path / "end.ckpt", encoder=encoder(), weights_only=True)
    assert dict(again.hparams) == dict(trainer.lightning_module.hparams) and again.hparams["warmup_steps"] == 2


def test_mixed_precision_computes_the_loss_in_float32(tmp_path):
    dtypes = []

    class Recording(VICReg):
        def loss_terms(self, z1, z2):
            terms = super().loss_terms(z1, z2)
            dtypes.extend([z1.dtype, terms["covariance"].dtype])
            return terms

    fit(Recording(encoder(), learning_rate=1e-3), tmp_path, 1, precision="bf16-mixed")
    assert dtypes == [torch.float32, torch.float32]


def test_base_class_requires_loss_terms():
    class Own(JointEmbedding):
        pass

    with pytest.raises(NotImplementedError, match=r"Own must define loss_terms\(z1, z2\)"):
        Own(encoder(), learning_rate=0.1).loss(torch.ones(2, 2), torch.ones(2, 2))


class Sharded(L.LightningDataModule):
    """Data whose global batches do not depend on the number of processes."""

    def train_dataloader(self):
        pairs = torch.randn(2, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        data, ranks = torch.utils.data.TensorDataset(*(pairs + pairs[:1])), self.trainer.world_size
        sampler = torch.utils.data.DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return torch.utils.data.DataLoader(data, batch_size=8 // ranks, sampler=sampler)


@pytest.mark.slow
def test_two_cpu_processes_match_one_process(tmp_path):
    def train(**trainer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        module = VICReg(torch.nn.Sequential(*layers).double(), learning_rate=0.005, momentum=0.9)
        fit(module, tmp_path, 20, loader=Sharded(), use_distributed_sampler=False, **trainer)
        return module.state_dict()

    one, two = train(), train(devices=2, strategy="ddp_spawn", plugins=[SyncBatchNorm()])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-12)


def test_other_optimiser_uses_the_learning_rate_and_is_not_saved_in_checkpoints(tmp_path):
    module = BarlowTwins(
        encoder(), learning_rate=0.02, warmup_steps=2, optimizer=partial(torch.optim.AdamW, weight_decay=0.1)
    )
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True)
    trainer = fit(module, tmp_path, 3, callbacks=[checkpoint])
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 0.02 and optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "optimizer" not in torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["hyper_parameters"]
    again = BarlowTwins.load_from_checkpoint(
        tmp_path / "saved/last.ckpt", encoder=encoder(), optimizer=torch.optim.Adam
    )
    assert torch.equal(again.encoder.weight, module.encoder.weight) and again.optimizer is torch.optim.Adam
    with pytest.raises(
        ValueError, match="momentum and weight_decay are settings of SGD and must be 0 with another optimizer"
    ):
        VICReg(encoder(), 0.1, momentum=0.9, optimizer=torch.optim.Adam)


def test_command_line_optimiser_is_saved_and_required_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    options = ["--model.optimizer=AdamW", "--model.optimizer.weight_decay=0.1"]
    stepwise("fit", *options)
    (path,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 1e-3 and group["weight_decay"] == 0.1 and "betas" in group
    stepwise("fit", *options, "--trainer.max_steps=4", "--ckpt_path=last")
    assert torch.load(path, weights_only=True)["global_step"] == 4
    assert isinstance(BarlowTwins.load_from_checkpoint(path).configure_optimizers(), torch.optim.AdamW)
    with pytest.raises(SystemExit, match="the checkpoint was trained with optimizer="):
        stepwise("fit", "--trainer.max_steps=6", "--ckpt_path=last")
