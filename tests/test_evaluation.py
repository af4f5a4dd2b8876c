"""The online probe and k-NN: right answers by another route, no trace in training, the same for any number of ranks."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from stepwise_lightning import TwoViewDataModule, VICReg
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.evaluation import OnlineKNN, OnlineLinearProbe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eighty pictures of two classes that differ in colour, a fifth of them outside the classes' folders."""
    root = tmp_path_factory.mktemp("images")
    for number in range(80):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 120, (12, 12, 3)) + 10 * np.eye(3)[number % 2]
        name = f"{number:02d}.png"
        path = root / (name if number % 5 == 3 else f"class_{number % 2}/{name}")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(root)


def parts(folder: str) -> tuple[VICReg, TwoViewDataModule]:
    module = VICReg(Encoder(4, alpha=1e-2), learning_rate=1e-3, momentum=0.9)
    return module, TwoViewDataModule(folder, "weak", image_size=8, global_batch_size=8, num_probe_pairs=4)


def trainer(callbacks: list[L.Callback], epochs: int = 4, **settings) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet["log_every_n_steps"] = 4
    return L.Trainer(max_epochs=epochs, enable_model_summary=False, callbacks=callbacks, **(quiet | settings))


def fit(
    folder: str, callbacks: list[L.Callback], epochs: int = 4, ckpt_path: str | None = None, **settings
) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    running = trainer(callbacks, epochs, **settings)
    module, data = parts(folder)
    running.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return running


@pytest.fixture(scope="module")
def run(folder: str) -> tuple[L.Trainer, dict[str, float], torch.Tensor]:
    probe = OnlineLinearProbe(learning_rate=0.05)
    running = fit(folder, [probe, OnlineKNN(k=5)])
    metrics = {name: float(value) for name, value in running.callback_metrics.items()}
    return running, metrics, torch.get_rng_state()


@torch.no_grad()
def embedded(running: L.Trainer, loader) -> tuple[torch.Tensor, torch.Tensor]:
    module = running.lightning_module.eval()
    x, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    return module.encoder.backbone(x), labels


def test_training_is_bit_identical_with_and_without_them(run, folder: str) -> None:
    plain = fit(folder, [])
    assert torch.equal(torch.get_rng_state(), run[2])
    for ours, theirs in zip(
        run[0].lightning_module.state_dict().values(), plain.lightning_module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert run[0].lightning_module.training == plain.lightning_module.training


def test_neighbours_are_those_of_a_plain_loop(run) -> None:
    running, metrics, _ = run
    data = running.datamodule
    bank, answers = embedded(running, data.labelled_train_dataloader())
    held_out, labels = embedded(running, data.val_dataloader())
    assert len(bank) == 57 and answers.min() == 0  # of 72 training images
    known = labels >= 0
    held_out, labels, right = held_out[known], labels[known], 0
    assert len(labels) == 7
    for z, label in zip(held_out.double().numpy(), labels.tolist(), strict=True):
        cosines = [float(z @ b / np.linalg.norm(z) / np.linalg.norm(b)) for b in bank.double().numpy()]
        votes = [0.0, 0.0]
        for index in np.argsort(cosines)[-5:]:
            votes[int(answers[index])] += np.exp(cosines[index] / 0.07)
        right += int(np.argmax(votes)) == label
    assert metrics["val/knn_top1"] == pytest.approx(right / len(labels))


def test_the_probe_separates_what_is_separable(run) -> None:
    running, metrics, _ = run
    assert metrics["val/probe_top1"] >= 0.75 and "train/probe_loss" in metrics
    probe = next(c for c in running.callbacks if isinstance(c, OnlineLinearProbe))
    features, labels = embedded(running, running.datamodule.val_dataloader())
    features, labels = features[labels >= 0], labels[labels >= 0]
    state = probe.state_dict()["probe"]
    scaled = (features - state["0.running_mean"]) / (state["0.running_var"] + 1e-5).sqrt()
    answers = (scaled @ state["1.weight"].T + state["1.bias"]).argmax(1)
    assert metrics["val/probe_top1"] == pytest.approx((answers == labels).double().mean().item())


def test_a_checkpoint_carries_the_probe_to_validation_and_on(run, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    half = fit(folder, [OnlineLinearProbe(learning_rate=0.05)], epochs=2)
    half.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"]
    module, data = parts(folder)
    again = trainer([OnlineLinearProbe(), OnlineKNN(k=5)])
    again.validate(module, data, ckpt_path=path, verbose=False)
    assert again.callback_metrics["val/probe_top1"] == half.callback_metrics["val/probe_top1"]
    again.test(module, data, ckpt_path=path, verbose=False)
    assert {"test/probe_top1", "test/knn_top1"} <= set(again.callback_metrics)
    resumed = OnlineLinearProbe(learning_rate=0.05)
    fit(folder, [resumed], ckpt_path=str(path))
    whole = next(c for c in run[0].callbacks if isinstance(c, OnlineLinearProbe))
    for ours, theirs in zip(*(p.state_dict()["probe"].values() for p in (resumed, whole)), strict=True):
        assert torch.equal(ours, theirs)


def test_two_processes_get_the_result_of_one(folder: str, tmp_path: Path) -> None:
    script = f"""
import sys, warnings, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_evaluation import OnlineKNN, OnlineLinearProbe, fit
from stepwise_lightning.collectives import SyncBatchNorm
torch.set_num_threads(1)
probe = OnlineLinearProbe(learning_rate=0.05)
settings = dict(strategy="ddp", devices=2, plugins=[SyncBatchNorm()])
running = fit({folder!r}, [probe, OnlineKNN(k=5)], epochs=1, **settings)
metrics = {{name: float(value) for name, value in running.callback_metrics.items()}}
torch.save((metrics, probe.state_dict()["probe"]), f"{tmp_path}/{{running.global_rank}}.pt")
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (metrics, first), (others, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert metrics == others and all(torch.equal(first[name], second[name]) for name in first)
    probe = OnlineLinearProbe(learning_rate=0.05)
    alone = fit(folder, [probe, OnlineKNN(k=5)], epochs=1)
    for name in ("val/probe_top1", "val/knn_top1"):
        assert metrics[name] == pytest.approx(float(alone.callback_metrics[name]))
    for name, value in probe.state_dict()["probe"].items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-3)


def test_top5_is_logged_where_it_says_something(tmp_path: Path) -> None:
    running = trainer([OnlineKNN()], limit_val_batches=2)
    module, data = VICReg(Encoder(4), learning_rate=1e-3), TwoViewDataModule("photos", "weak", 8)
    (metrics,) = running.validate(module, data, verbose=False)
    assert 0.125 < metrics["val/knn_top1"] < metrics["val/knn_top5"] <= 1


def test_what_cannot_be_is_refused(folder: str, tmp_path: Path) -> None:
    module, data = parts(folder)
    with pytest.raises(ValueError, match="seen no labelled image: train with it first.*--ckpt_path"):
        trainer([OnlineLinearProbe()]).validate(module, data, verbose=False)
    with pytest.raises(ValueError, match="no submodule 'backbon' to watch; did you mean one of: .*backbone"):
        trainer([OnlineKNN(watch="backbon")]).validate(module, data, verbose=False)
    with pytest.raises(ValueError, match="datamodule that has this method"):
        trainer([OnlineKNN()]).fit(module, torch.utils.data.DataLoader([1]))
    for number in range(20):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    with pytest.raises(ValueError, match="OnlineLinearProbe found 0 classes in the data: use a data set with labels"):
        trainer([OnlineLinearProbe()]).fit(*parts(str(tmp_path)))
    for wrong in (lambda: OnlineKNN(k=0), lambda: OnlineKNN(temperature=0), lambda: OnlineLinearProbe(num_classes=1)):
        with pytest.raises(ValueError, match="must be at least"):
            wrong()
