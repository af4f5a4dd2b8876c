"""Views, order and loaders: batches independent of workers, ranks and resuming."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from fresh_processes import ProcessServer
from PIL import Image
from recorded_batches import Recorder, fit
from torch import Tensor

from stepwise_lightning import FixedCropPairs, TwoViewDataModule
from stepwise_lightning.data.image_sets import load_images
from stepwise_lightning.data.sampling import GlobalBatchSampler
from stepwise_lightning.data.views import crop_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write fifty images in two classes, 45 for training and 5 held out."""
    root = tmp_path_factory.mktemp("images")
    for number in range(50):
        path = root / f"class_{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(root)


def module(folder: str, **settings) -> TwoViewDataModule:
    defaults = {"augmentation": "weak", "image_size": 8, "global_batch_size": 8, "num_probe_pairs": 4}
    data = TwoViewDataModule(folder, **(defaults | settings))
    data.setup("fit")
    return data


def epoch(data: TwoViewDataModule, number: int = 0) -> list[Tensor]:
    """Return the training batches of one epoch, each with both views in one tensor."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [torch.cat([x1, x2]) for x1, x2, _ in loader]


def test_crop_pairs_are_normalised_crops() -> None:
    images = load_images("photos")
    x1, x2 = crop_pairs(images, 7, 32, seed=0)
    assert torch.equal(x1, x2)  # only one crop fits
    whole, _ = crop_pairs(images, len(images), 32, seed=1)
    torch.testing.assert_close(whole.double().mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.double().std((0, 2, 3)), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    x1, x2 = crop_pairs(images, 50, 20, seed=0)
    assert x1.shape == x2.shape == (50, 3, 20, 20) and x1.dtype == torch.float32 and not torch.equal(x1, x2)
    assert torch.equal(crop_pairs(images, 50, 20, seed=0)[1], x2)
    assert not torch.equal(crop_pairs(images, 50, 20, seed=1)[1], x2)


def test_crop_pairs_raises_for_sizes_out_of_range() -> None:
    images = load_images("photos")
    with pytest.raises(ValueError, match="num_pairs 2691 does not fit a data set of 2690 images: choose 1 to 2690"):
        crop_pairs(images, 2691, 20, 0)
    for size in (0, 33):
        with pytest.raises(ValueError, match=f"crop_size {size} does not fit images of 32×32 pixels: choose 1 to 32"):
            crop_pairs(images, 5, size, 0)


def test_fixed_crop_pairs_repeats_one_batch() -> None:
    data = FixedCropPairs(num_pairs=6, crop_size=8, steps_per_epoch=3)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 3
    assert all(x1 is data.x1 and x2 is data.x2 for x1, x2 in batches)
    assert torch.equal(data.x1, crop_pairs(load_images("photos"), 6, 8, 0)[0])


@pytest.mark.parametrize("augmentation", ["weak", "standard"])
def test_views_differ_by_sample_view_and_epoch(augmentation: str, folder: str) -> None:
    data = module(folder, augmentation=augmentation)
    views = data.train_dataloader().dataset
    drawn = torch.stack([views[e, 3][v] for e in range(8) for v in range(2)])
    assert drawn.shape == (16, 3, 8, 8) and drawn.dtype == torch.float32
    assert len(drawn.unique(dim=0)) > 12  # small images have few different crops
    assert torch.equal(views[5, 3][1], drawn[11])  # independent of the order
    assert module(folder, augmentation=augmentation, seed=1).train_dataloader().dataset[5, 3][1].ne(drawn[11]).any()


def test_crops_differ_within_a_batch(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for number in range(20):
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    x1, _, _ = next(iter(module(str(tmp_path), global_batch_size=16).train_dataloader()))
    assert len(x1.unique(dim=0)) == 16  # copies of one image, where only the crop differs


def test_views_do_not_change_the_global_generator(folder: str) -> None:
    data = module(folder, augmentation="standard")
    before = torch.get_rng_state()
    first = epoch(data)
    data.probe_pairs()
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(torch.stack(epoch(data)), torch.stack(first))


def test_only_standard_views_change_colours(folder: str) -> None:
    # Only grayscale conversion removes all colour from these images of noise.
    def grays(augmentation: str) -> float:
        data = module(folder, augmentation=augmentation, image_size=16)
        views = data.train_dataloader().dataset
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        rgb = torch.stack([views[0, i][0] * std + mean for i in range(45)])
        assert rgb.min() > -1e-5 and rgb.max() < 1 + 1e-5
        return (rgb.amax(1) - rgb.amin(1)).amax((1, 2)).lt(1e-3).double().mean().item()

    assert grays("weak") == 0 and 0.05 < grays("standard") < 0.45  # a fifth, of 45 images


def test_batches_are_independent_of_the_number_of_workers(folder: str) -> None:
    alone, helped = (module(folder, augmentation="standard", num_workers=n) for n in (0, 2))
    loaders = [data.train_dataloader() for data in (alone, helped)]
    for number in (0, 1):  # persistent workers must switch to the next epoch
        for loader in loaders:
            loader.sampler.set_epoch(number)
        first, second = ([torch.cat([x1, x2]) for x1, x2, _ in loader] for loader in loaders)
        assert len(first) == 5 and torch.equal(torch.stack(first), torch.stack(second))
        assert torch.equal(torch.stack(first), torch.stack(epoch(alone, number)))
    assert not torch.equal(torch.stack(epoch(alone, 0)), torch.stack(epoch(alone, 1)))


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_global_batch_is_independent_of_the_number_of_ranks(num_replicas: int) -> None:
    images = range(100)
    one = GlobalBatchSampler(images, 12, seed=3)
    ranks = [GlobalBatchSampler(images, 12, num_replicas, rank, seed=3) for rank in range(num_replicas)]
    for number in (0, 4):
        for sampler in (one, *ranks):
            sampler.set_epoch(number)
        expected = torch.tensor(list(one)).view(8, 12, 2)
        shares = [torch.tensor(list(sampler)).view(8, 12 // num_replicas, 2) for sampler in ranks]
        assert torch.equal(torch.cat(shares, dim=1), expected)
        assert (expected[..., 0] == number).all() and len(expected[..., 1].unique()) == 96
        assert all(len(sampler) == 96 // num_replicas for sampler in ranks)


def batches_in_ddp(folder: str) -> Tensor:
    """Return the batches of this rank, of two."""
    return torch.stack(fit(Recorder(), module(folder, augmentation="standard", seed=0), strategy="ddp", devices=2))


@pytest.mark.slow
def test_two_ranks_share_the_batches_of_one_process(folder: str, processes: ProcessServer) -> None:
    shares = processes.run_ranks(2, batches_in_ddp, folder)
    joined = torch.cat([share.unflatten(1, (2, 4)) for share in shares], dim=2).flatten(1, 2)  # view, then sample
    alone = torch.stack(fit(Recorder(), module(folder, augmentation="standard", seed=0)))
    assert torch.equal(joined, alone)


@pytest.mark.parametrize(
    ("save_at", "num_workers"),
    [
        pytest.param(7, 0, id="mid-epoch"),
        pytest.param(10, 0, id="last-batch"),
        pytest.param(-1, 0, id="epoch-end"),
        pytest.param(7, 2, id="mid-epoch, workers"),
        pytest.param(10, 2, id="last-batch, workers", marks=pytest.mark.slow),
        pytest.param(-1, 2, id="epoch-end, workers", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_has_the_same_batches(save_at: int, num_workers: int, folder: str, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.ckpt")
    data = {"augmentation": "standard", "num_workers": num_workers}
    whole = fit(Recorder(save_at, path), module(folder, **data))
    assert len(whole) == 15
    torch.load(path, weights_only=True)
    resumed = fit(Recorder(), module(folder, **data), ckpt_path=path)
    num_completed = 10 if save_at == -1 else save_at
    assert torch.equal(torch.stack(resumed), torch.stack(whole[num_completed:]))


def test_abandoned_iteration_does_not_skip_batches(folder: str) -> None:
    loader = module(folder).train_dataloader()
    first = next(iter(loader))[0]
    assert torch.equal(next(iter(loader))[0], first)
    assert len(list(loader)) == len(list(loader)) == 5


def test_probe_pairs_are_fixed_and_held_out(folder: str) -> None:
    data = module("photos", num_probe_pairs=20)
    x1, x2 = data.probe_pairs()
    assert x1.shape == x2.shape == (20, 3, 8, 8) and x1.dtype == torch.float32 and not torch.equal(x1, x2)
    assert data.probe_pairs()[0] is x1
    again = module("photos", num_probe_pairs=20, num_workers=2, global_batch_size=2).probe_pairs()
    assert torch.equal(again[0], x1) and torch.equal(again[1], x2)
    assert torch.equal(module("photos", num_probe_pairs=20, seed=1).probe_pairs()[0], x1)
    assert not torch.equal(module("photos", num_probe_pairs=20, probe_seed=1).probe_pairs()[0], x1)
    # No training image of a folder is held out.
    plain = module(folder, image_size=None)
    loaders = plain.labelled_train_dataloader(), plain.val_dataloader()
    train, val = (torch.cat([x for x, _ in loader]) for loader in loaders)
    assert len(train) == 45 and len(val) == 5 and len(torch.cat([train, val]).unique(dim=0)) == 50
    with pytest.raises(ValueError, match="num_probe_pairs 6 is more than the 5 held-out images: choose 2 to 5"):
        module(folder, num_probe_pairs=6).probe_pairs()


def test_plain_loaders_yield_every_image_once_with_its_label(folder: str) -> None:
    data = module(folder, image_size=None)
    data.setup("test")
    x, labels = (torch.cat(part) for part in zip(*data.labelled_train_dataloader(), strict=True))
    images = data.images("train").images
    pixels = x * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    torch.testing.assert_close(pixels, images / 255)
    assert data.class_names == ["class_0", "class_1"] and labels.bincount().tolist() == [23, 22]
    torch.testing.assert_close(x.double().mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert sum(len(x) for x, _ in loader) == 5
    assert next(iter(data.train_dataloader()))[2].dtype == torch.int64


def test_trainer_uses_all_loaders(folder: str) -> None:
    class Model(Recorder):
        seen = 0

        def validation_step(self, batch, batch_idx: int) -> None:
            self.seen += len(batch[0])

        test_step = validation_step

    model, data = Model(), TwoViewDataModule(folder, "weak", 8, 8)
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu", num_sanity_val_steps=0
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert len(model.batches) == 5 and model.seen == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "strong"}, "unknown augmentation 'strong': choose one of standard, weak"),
        ({"global_batch_size": 1}, "global_batch_size must be at least 2.*, got 1"),
        ({"global_batch_size": 46}, "global_batch_size 46 is larger than the 45 training images: choose 2 to 45"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"num_probe_pairs": 1}, "num_probe_pairs must be at least 2, got 1"),
    ],
)
def test_invalid_settings_raise(settings: dict, message: str, folder: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(folder, **settings).train_dataloader()


def test_global_batch_not_divisible_by_the_ranks_raises(folder: str) -> None:
    message = "global_batch_size 8 cannot be divided among 3 processes: choose a multiple of 3, for example 9"
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(range(50), 8, 3, 0)
    data = TwoViewDataModule(folder, global_batch_size=8)
    data.trainer = type("Trainer", (), {"world_size": 3, "global_rank": 0})()
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_overfit_batches_raises(folder: str) -> None:
    with pytest.raises(ValueError, match="overfit_batches would replace .* limit_train_batches"):
        fit(Recorder(), module(folder), overfit_batches=2)


def test_images_of_different_sizes_require_image_size(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (20, 14 + number), (number, 20 * number, 255 - number)).save(tmp_path / f"{number:02d}.png")
    with pytest.raises(ValueError, match="image_size must be given"):
        module(str(tmp_path), image_size=None)
    data = module(str(tmp_path), image_size=8, global_batch_size=11)
    assert next(iter(data.train_dataloader()))[0].shape == (11, 3, 8, 8)
    (tmp_path / "03.png").write_text("damaged since")
    with pytest.raises(ValueError, match=r"03\.png' cannot be read as an image.*repair it"):
        epoch(data)


def test_loader_resumes_from_its_state(folder: str) -> None:
    data = module(folder)
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 0, "batches": 3}
    fresh = data.train_dataloader()
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    rest = [torch.cat([x1, x2]) for x1, x2, _ in fresh]
    assert torch.equal(torch.stack(rest), torch.stack(epoch(data)[3:]))
    fresh.load_state_dict(state)
    fresh.sampler.set_epoch(1)  # as after limit_train_batches: the rest of the epoch is skipped
    assert len(list(fresh)) == 5
    fresh.load_state_dict({"epoch": 1, "batches": 5})
    assert torch.equal(next(iter(fresh))[0], epoch(data, 2)[0][:8])
