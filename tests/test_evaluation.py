"""Online linear probe and k-NN: accuracies, bit-identical training, and several ranks."""

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from fresh_processes import ProcessServer
from PIL import Image

from stepwise_lightning import TwoViewDataModule, VICReg
from stepwise_lightning.__main__ import main
from stepwise_lightning.callbacks.classifiers import LinearProbe, knn_scores
from stepwise_lightning.callbacks.online_evaluation import OnlineKNN, OnlineLinearProbe
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.sync_batchnorm import SyncBatchNorm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write 80 images of two classes of different colour, a fifth of them without a label."""
    root = tmp_path_factory.mktemp("images")
    for number in range(80):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 120, (12, 12, 3)) + 60 * np.eye(3)[number % 2]
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


def test_training_is_bit_identical_with_and_without_evaluation(run, folder: str) -> None:
    plain = fit(folder, [])
    assert torch.equal(torch.get_rng_state(), run[2])
    for ours, theirs in zip(
        run[0].lightning_module.state_dict().values(), plain.lightning_module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert run[0].lightning_module.training == plain.lightning_module.training


def test_knn_accuracy_matches_a_loop(run) -> None:
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


def test_probe_accuracy_matches_its_saved_weights(run) -> None:
    running, metrics, _ = run
    assert metrics["val/probe_top1"] >= 0.75 and "train/probe_loss" in metrics
    probe = next(c for c in running.callbacks if isinstance(c, OnlineLinearProbe))
    features, labels = embedded(running, running.datamodule.val_dataloader())
    features, labels = features[labels >= 0], labels[labels >= 0]
    state = probe.state_dict()["probe"]
    scaled = (features - state["0.running_mean"]) / (state["0.running_var"] + 1e-5).sqrt()
    answers = (scaled @ state["1.weight"].T + state["1.bias"]).argmax(1)
    assert metrics["val/probe_top1"] == pytest.approx((answers == labels).double().mean().item())


def test_checkpoint_restores_the_probe_for_validation_and_resume(run, folder: str, tmp_path: Path) -> None:
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


class Embedded(L.Callback):
    """Count the images in each forward pass of the representation outside of training, and whether autocast was on."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, bool]] = []
        self.labels: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def count(part: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not part.training:
                self.passes.append((len(output), torch.is_autocast_enabled("cpu")))

        pl_module.encoder.backbone.register_forward_hook(count)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        self.labels.append(int((batch[2] >= 0).sum()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_probe_embeds_labelled_images_in_the_precision_of_training(folder: str, precision: str) -> None:
    embedded = Embedded()
    fit(folder, [embedded, OnlineLinearProbe()], epochs=1, precision=precision, limit_val_batches=0)
    assert 2 <= min(embedded.labels) < 8 and len(embedded.labels) == 9
    assert embedded.passes == [(number, precision == "bf16-mixed") for number in embedded.labels]


def fit_in_ddp(folder: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train on two ranks; return the metrics and the state of the probe."""
    probe = OnlineLinearProbe(learning_rate=0.05)
    running = fit(folder, [probe, OnlineKNN(k=5)], epochs=1, strategy="ddp", devices=2, plugins=[SyncBatchNorm()])
    return {name: float(value) for name, value in running.callback_metrics.items()}, probe.state_dict()["probe"]


@pytest.mark.slow
def test_two_ranks_compute_the_metrics_of_one_process(folder: str, processes: ProcessServer) -> None:
    (metrics, first), (others, second) = processes.run_ranks(2, fit_in_ddp, folder)
    assert metrics == others and all(torch.equal(first[name], second[name]) for name in first)
    probe = OnlineLinearProbe(learning_rate=0.05)
    alone = fit(folder, [probe, OnlineKNN(k=5)], epochs=1)
    for name in ("val/probe_top1", "val/knn_top1"):
        assert metrics[name] == pytest.approx(float(alone.callback_metrics[name]))
    for name, value in probe.state_dict()["probe"].items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-3)


def test_top5_is_logged_with_more_than_five_classes(tmp_path: Path) -> None:
    running = trainer([OnlineKNN()], limit_val_batches=2)
    module, data = VICReg(Encoder(4), learning_rate=1e-3), TwoViewDataModule("photos", "weak", 8)
    (metrics,) = running.validate(module, data, verbose=False)
    assert 0.125 < metrics["val/knn_top1"] < metrics["val/knn_top5"] <= 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_accuracies_are_logged_in_other_precisions(folder: str, precision: str) -> None:
    running = fit(folder, [OnlineLinearProbe(), OnlineKNN(k=5)], 1, precision=precision, limit_train_batches=2)
    assert {"val/probe_top1", "val/knn_top1"} <= set(running.callback_metrics)


@pytest.mark.parametrize("max_similarities", [2**26, 25, 1], ids=["at once", "two rows", "one row"])
def test_votes_match_a_loop_for_any_block_size(max_similarities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwise_lightning.callbacks.classifiers._MAX_SIMILARITIES", max_similarities)
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(10, 6, generator=generator))
    labels = torch.randint(3, (10,), generator=generator)
    features = torch.randn(7, 6, generator=generator)
    expected = torch.zeros(7, 3)
    for row, z in enumerate(features):
        cosines = [torch.cosine_similarity(z, b, dim=0).item() for b in bank]
        for index in np.argsort(cosines)[-4:]:
            expected[row, labels[index]] += np.exp((cosines[index] - 1) / 0.3)
    torch.testing.assert_close(knn_scores(features, bank, labels, 3, 4, 0.3), expected)


def test_moving_the_probe_moves_its_optimiser() -> None:
    probe = LinearProbe(3, 2, learning_rate=0.1)
    probe.step(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]))
    probe.to(torch.float64)  # like a move to a GPU: the same parameters, with other tensors
    assert {state["exp_avg"].dtype for state in probe.optimizer.state.values()} == {torch.float64}


# Lightning warns about the ModelCheckpoint of a run when the run is evaluated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_command_line_trains_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [
        "stepwise_lightning.callbacks.online_evaluation.OnlineLinearProbe",
        "stepwise_lightning.callbacks.online_evaluation.OnlineKNN",
        "stepwise_lightning.LastCheckpoint",
    ]
    lines = "".join(f"    - class_path: {name}\n" for name in callbacks)
    (tmp_path / "mine.yaml").write_text(f"trainer:\n  max_steps: 2\n  callbacks:\n{lines}")
    config = Path(__file__).parent.parent / "configs" / "vicreg_photos.yaml"

    def stepwise(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stepwise", *arguments, "--trainer.enable_progress_bar=false"])
        main()
        return capsys.readouterr().out

    stepwise("fit", f"--config={config}", "--config=mine.yaml")
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/*.ckpt")
    run = checkpoint.parent.parent / "config.yaml"
    for command, stage in (("validate", "val"), ("test", "test")):
        shown = stepwise(command, f"--config={run}", f"--ckpt_path={checkpoint}")
        assert all(f"{stage}/{name}" in shown for name in ("probe_top1", "probe_top5", "knn_top1", "knn_top5"))
    assert len(list(tmp_path.glob("runs/*/*"))) == 1
    with pytest.raises(SystemExit, match="the linear probe is untrained.*--ckpt_path"):
        stepwise("validate", f"--config={run}")


def test_invalid_settings_and_data_raise(folder: str, tmp_path: Path) -> None:
    module, data = parts(folder)
    with pytest.raises(ValueError, match="is untrained: train it first.*--ckpt_path"):
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
