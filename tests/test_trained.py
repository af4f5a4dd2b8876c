"""Trained networks: load_encoder, embeddings of images, export to torchvision."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from tiny_runs import changed, stepwise, write_images
from torchvision.models import resnet18
from torchvision.transforms._presets import ImageClassification

from stepwise_lightning import BarlowTwins, ResNet, TwoViewDataModule, VICReg, load_encoder
from stepwise_lightning.__main__ import main
from stepwise_lightning.spectrum import effective_rank, embedding_eigenvalues, rankme
from stepwise_lightning.trained import embed_images, image_features, torchvision_weights

ENCODER = {
    "class_path": "stepwise_lightning.Encoder",
    "init_args": {"out_features": 3, "projector_depth": 2, "hidden_features": 8},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a small ResNet for two steps, and return the folder of the run."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stepwise("fit", config=changed({"model.init_args.encoder": ENCODER}))
    return folder / "runs/lightning_logs/version_0"


@pytest.fixture(autouse=True)
def in_the_folder_of_the_run(run, monkeypatch):
    monkeypatch.chdir(run.parents[2])  # its configuration has a relative path of the data


def command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stepwise", *map(str, arguments)])
        main()


def test_load_encoder_rebuilds_the_network_with_trained_weights(run):
    checkpoint = run / "checkpoints/last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for encoder in (load_encoder(run), load_encoder(checkpoint)):
        assert not encoder.training
        for name, values in encoder.state_dict().items():
            assert torch.equal(values, saved[f"encoder.{name}"])
    module = BarlowTwins.load_from_checkpoint(checkpoint)
    assert module.hparams["learning_rate"] == 1e-3
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(module.eval()(x), load_encoder(run)(x))


def test_load_encoder_refuses_incomplete_runs(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*; give one of its runs, such as .*version_0"):
        load_encoder(run.parent)
    with pytest.raises(FileNotFoundError, match="no run 'nowhere'"):
        load_encoder("nowhere")
    lone = tmp_path / "checkpoints/last.ckpt"
    lone.parent.mkdir()
    lone.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no config.yaml in .* load_from_checkpoint\(path, encoder=…\)"):
        load_encoder(lone)
    (tmp_path / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("out_features: 3", "out_features: 4")
    )
    with pytest.raises(ValueError, match="does not fit the encoder in the configuration of its run"):
        load_encoder(lone)
    with pytest.raises(ValueError, match="BarlowTwins"):
        VICReg.load_from_checkpoint(run / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="weights_only=False is not supported, because a checkpoint could run code"):
        BarlowTwins.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=False)


def test_configuration_of_another_class_is_refused(run, tmp_path):
    copy = tmp_path / "checkpoints/last.ckpt"
    copy.parent.mkdir()
    copy.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    (tmp_path / "config.yaml").write_text(
        "model:\n  init_args:\n    encoder:\n      class_path: pathlib.Path\n      init_args: {}\n"
    )
    with pytest.raises(ValueError, match="the configuration of the run cannot be rebuilt"):
        load_encoder(copy)


def test_embed_preprocesses_like_held_out_images(run, tmp_path, capsys):
    command("embed", run, "--data=images", f"--out={tmp_path / 'e.npz'}")
    with np.load(tmp_path / "e.npz") as file:
        arrays = dict(file)
    assert arrays["embeddings"].shape == (20, 3) and arrays["hidden"].shape == (20, 64)
    assert arrays["class_names"].tolist() == ["class_0", "class_1"]
    for path, label in zip(arrays["paths"], arrays["labels"], strict=True):
        assert path.split("/")[1] == f"class_{label}"
    data = TwoViewDataModule("images", "weak", global_batch_size=4, num_probe_pairs=2)
    data.setup("fit")
    held_out = torch.cat([x for x, _ in data.val_dataloader()])
    with torch.no_grad():
        expected = load_encoder(run)(held_out).numpy()
    np.testing.assert_allclose(arrays["embeddings"][9::10], expected, rtol=1e-5, atol=1e-7)
    assert embedding_eigenvalues(torch.from_numpy(arrays["embeddings"])).shape == (3,)
    with pytest.raises(SystemExit, match="2"):
        command("embed", run, "--data=images", f"--out={tmp_path / 'e.npz'}")
    assert "e.npz exists: name a new file" in capsys.readouterr().err


def test_split_folders_share_their_classes(run, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "split" / split).mkdir(parents=True)
        (tmp_path / "split" / split / "class_1").symlink_to(Path("images/class_1").absolute())
    arrays = embed_images(run, str(tmp_path / "split/val"))
    assert set(arrays["labels"]) == {0} and len(arrays["labels"]) == 10


def test_embed_with_data_workers_and_without_a_gpu(run, monkeypatch):
    expected, arrays = (embed_images(run, "images", num_workers=number) for number in (0, 1))
    assert all(np.array_equal(arrays[name], values) for name, values in expected.items())
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="accelerator 'gpu' is not available: use auto, cpu$"):
        embed_images(run, "images", accelerator="gpu")


def test_torchvision_loads_exported_weights(run, tmp_path, capsys):
    command("export", run, f"--out={tmp_path / 'w.pt'}")
    weights = torch.load(tmp_path / "w.pt", weights_only=True)
    assert weights.keys() == torchvision_weights(run).keys()
    network = load_encoder(run).backbone.network
    theirs, ours = resnet18(weights=None).state_dict(), ResNet("resnet18", small_images=False).network.state_dict()
    assert {name for name in theirs if not name.startswith("fc.")} == ours.keys()
    code = capsys.readouterr().out.split("\n\n")[1]
    names: dict = {}
    exec("\n".join(line.strip() for line in code.splitlines()), names)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(names["network"].eval()(x), network(x))


def test_predict_is_not_a_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        command("predict")
    assert "unknown command 'predict'; choose from: fit, validate, test, forecast, " in capsys.readouterr().err


def test_image_features_of_a_torchvision_network_have_a_rank():
    torch.manual_seed(0)
    network, transform = resnet18(), ImageClassification(crop_size=32, resize_size=32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    features = image_features(network, "images", transform, watch="avgpool", batch_size=7)
    assert features.shape == (20, 512) and 1 < float(rankme(features)) <= 20
    assert 1 < float(effective_rank(embedding_eigenvalues(features.numpy()))) <= 19
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    logits = image_features(network, "images", transform)
    torch.testing.assert_close(network.eval().fc(features), logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no submodule 'pool' to watch; did you mean"):
        image_features(network, "images", transform, watch="pool")
    with pytest.raises(ValueError, match="neither one of photos.* nor the path of an existing folder"):
        image_features(network, "missing", transform)
