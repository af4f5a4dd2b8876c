"""Descriptions of modes, their page and files, for a run with known modes and for images of every kind."""

import base64
import json
import shutil
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import changed, stepwise
from torch import nn

from stepwise_lightning import SpectrumRecord, describe_modes, load_encoder
from stepwise_lightning.__main__ import main
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.modes import Modes, attributes, variations
from stepwise_lightning.modes.sensitivity import occlusion_maps

SIZE = 8
CHANGES = {
    "model.init_args.encoder.init_args": {"in_features": 3 * SIZE**2, "out_features": 3, "init_std": 1e-3},
    "model.init_args.learning_rate": 2e-3,
    "data.init_args.augmentation": "standard",
    "data.init_args.global_batch_size": 16,
    "trainer.max_steps": 40,
}


def write_image(path, pixels, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def levels(number, side=SIZE):
    """Return a noisy image whose brightness grows with its number."""
    noise = np.random.default_rng(number).integers(0, 60, (side, side, 3))
    return (noise + 6 * number).astype(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a linear model on images of different brightness and return the folder of the run."""
    folder = tmp_path_factory.mktemp("modes")
    for split in ("train", "val"):
        for number in range(32):
            write_image(folder / "images" / split / f"class_{number // 16}" / f"{number:02d}.png", levels(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stepwise("fit", config=changed(CHANGES))
    return folder / "runs/lightning_logs/version_0"


@pytest.fixture(scope="module")
def description(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[2])
        return describe_modes(run)


def command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stepwise", "modes", *map(str, arguments)])
        main()


def refusal(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    (line,) = (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err).strip().splitlines()
    return line


def test_first_mode_is_the_brightness_of_the_images(description):
    assert len(description.images) == 32 and description.modes.matrix == "cross_correlation"
    assert abs(description.attributes["brightness"][0]) > 0.98 and description.explained[0] > 0.95
    assert description.class_share[0] > 0.6  # 3/4 for a uniform coordinate and two classes
    for name in ("crop position", "flip", "hue", "blur"):
        assert description.invariance[name][0] > 0.97
    assert description.invariance["brightness"][0] < 0.97
    assert description.invariance["all together"][0] < description.invariance["flip"][0]
    low, middle, high = (description.images[ends].mean() for ends in description.ends[0])
    assert min(low, high) < middle < max(low, high)


def test_mean_gradient_of_a_linear_encoder_is_its_mode(run, description):
    weight = load_encoder(run).weight.detach().double()
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["TwoViewDataModule"]
    expected = (description.modes.directions.T @ weight).unflatten(1, (3, SIZE, SIZE))
    expected = expected / torch.tensor(state["std"]).double()[:, None, None]
    torch.testing.assert_close(description.gradients, expected, rtol=1e-5, atol=1e-9)


class Page(HTMLParser):
    """Parse a page: open tags, images, ids, words, and references to other files."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.loaded, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "img":
            self.images.append(attrs)
        self.loaded += [v for k, v in attrs.items() if k in ("src", "href") and not v.startswith(("data:", "#"))]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_is_well_formed_and_self_contained(description):
    page = Page(description.html())
    count = len(description.modes)
    assert page.open == [] and page.loaded == [] and page.ids == [f"mode-{mode + 1}" for mode in range(count)]
    assert len(page.images) == count * (3 * 6 + 2 * 3 + 1)
    for image in page.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64" and image["alt"]
        assert Image.open(BytesIO(base64.b64decode(data))).size == (SIZE, SIZE)
    assert "class_1" in "".join(page.words) and "url(" not in description.html() and "@import" not in description.html()
    assert description._repr_html_().startswith("<iframe srcdoc=")


def test_data_workers_do_not_change_the_description(run, description, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    other = describe_modes(run, num_workers=1)
    assert torch.equal(other.coordinates, description.coordinates)
    assert all(torch.equal(other.invariance[name], values) for name, values in description.invariance.items())


def test_command_writes_page_and_projector_without_overwriting(run, description, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[2])
    command(run, "--images", 9)
    printed = capsys.readouterr().out
    assert str(run / "modes/modes.html") in printed and f"tensorboard --logdir {run / 'modes/projector'}" in printed
    first = (run / "modes/modes.html").read_bytes()
    (place,) = (run / "modes/projector").glob("*/embedding")
    assert np.loadtxt(place / "tensors.tsv").shape == (9, 3)
    head, *rows = (place / "metadata.tsv").read_text(encoding="utf-8").splitlines()
    assert head == "class\tpath\tbrightness" and len(rows) == 9 and rows[0].startswith("class_0\t")
    with Image.open(place / "sprite.png") as sprite:
        assert sprite.size == (3 * SIZE, 3 * SIZE)
    assert "single_image_dim: 8" in (run / "modes/projector/projector_config.pbtxt").read_text()
    command(run, "--images", 9)
    assert (run / "modes-v1/modes.html").exists() and (run / "modes/modes.html").read_bytes() == first
    assert "exists: name a new folder" in refusal(capsys, run, "--out", run / "modes")


KINDS = {
    "gray, no labels, different sizes": [("L", f"{n}.png", 6 + n) for n in range(6)],
    "RGBA, one class with a name to escape": [("RGBA", f'a <b> "c" & d/{n}.png', 11) for n in range(5)],
    "large, some without a label": [("RGB", f"{'a/' * (n % 2)}{n}.png", 140) for n in range(4)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_images_of_every_kind(kind, run, tmp_path):
    for number, (mode, name, side) in enumerate(KINDS[kind]):
        write_image(tmp_path / "data" / name, levels(5 * number, side), mode)
    description = describe_modes(run, str(tmp_path / "data"))
    assert len(description.images) == len(KINDS[kind]) and description.class_share is None
    assert description.attributes["saturation"].isnan().all() == ("gray" in kind)
    assert Page(description.html()).open == [] and all(Path(path).exists() for path in description.paths)


def test_invalid_runs_and_images_raise_one_line(run, tmp_path, capsys):
    assert "no run 'nowhere'" in refusal(capsys, "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images in" in refusal(capsys, run, "--data", tmp_path / "empty")
    write_image(tmp_path / "few/0.png", levels(3))
    assert "1 images are too few" in refusal(capsys, run, "--data", tmp_path / "few")
    assert "num_images must be at least 4, got 3" in refusal(capsys, run, "--images", 3)
    foreign = tmp_path / "foreign"
    shutil.copytree(run / "checkpoints", foreign / "checkpoints")
    assert "no config.yaml in" in refusal(capsys, foreign, "--data", tmp_path / "few")
    for number in range(5):
        write_image(tmp_path / f"same/{number}.png", levels(3))
    assert "no learned modes in" in refusal(capsys, run, "--data", tmp_path / "same")
    early = tmp_path / "early"
    shutil.copytree(run, early)
    record = SpectrumRecord.load(run).arrays()
    record["cross_correlation"][-1] = record["cross_correlation"][0]
    SpectrumRecord.from_arrays(record).save(early / "spectrum.npz")
    assert "no eigenvalue of its cross_correlation has changed by a tenth" in refusal(capsys, early)


def test_without_a_record_eigenvalues_give_the_number_of_modes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    shutil.copytree(run, tmp_path / "bare")
    (tmp_path / "bare/spectrum.npz").unlink()
    description = describe_modes(tmp_path / "bare")
    assert len(description.modes) >= 1 and description.modes.eigenvalues[-1] > 0.1 * description.modes.eigenvalues[0]


def test_occlusion_map_is_positive_where_the_encoder_has_weights():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 1, bias=False)).eval()
    with torch.no_grad():
        encoder[1].weight.zero_().unflatten(1, (3, 8, 8))[0, 0, :4, :4] = 1.0
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        modes = Modes.of(encoder(images))
    maps = occlusion_maps(encoder, modes, images)
    assert maps.shape == (6, 1, 8, 8) and (maps[:, 0, :4, :4] > 0).all() and (maps[:, 0, 5:, 5:] == 0).all()


def test_attributes_of_known_images():
    images = torch.zeros(5, 3, 8, 8)
    images[1] = 1.0  # white
    images[2, 0] = 1.0  # red
    images[3, 2] = 1.0  # blue
    images[4, :, ::2, ::2] = images[4, :, 1::2, 1::2] = 1.0  # a checkerboard
    values = {name: value.tolist() for name, value in attributes.image_attributes(images).items()}
    assert values["brightness"] == pytest.approx([0, 0.9999, 0.2989, 0.114, 0.49995])
    assert values["contrast"] == pytest.approx([0, 0, 0, 0, 0.49995], abs=1e-9)
    assert values["saturation"] == pytest.approx([0, 0, 1, 1, 0])
    assert values["red − green"] == pytest.approx([0, 0, 1, 0, 0])
    assert values["blue − yellow"] == pytest.approx([0, 0, -0.5, 1, 0])
    assert values["fine detail"] == pytest.approx([0, 0, 0, 0, 1])


def test_shares_of_variance_in_known_cases():
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(400, count, 1, generator=generator).double() for count in (1, 4))
    torch.testing.assert_close(
        variations.intraclass_correlation(images + noise), torch.tensor([0.5]).double(), rtol=0, atol=0.05
    )
    assert variations.invariance(images.expand(-1, 3, -1)) == pytest.approx(1)
    shifts = torch.tensor([-1.0, 0, 1]).double()[None, :, None]
    assert variations.invariance(images * 0 + shifts) == pytest.approx(0)
    labels = torch.arange(400) % 4
    assert attributes.class_share(images[:, 0] + 5 * labels[:, None], labels) > 0.95
    assert abs(attributes.class_share(images[:, 0], labels)) < 0.02
    assert attributes.class_share(images[:, 0], labels * 0) is None
    values = {"one": noise[:, 0, 0], "two": noise[:, 1, 0]}
    mode = (noise[:, 0] - 2 * noise[:, 1] + noise[:, 2]).double()
    x = torch.stack([torch.ones(400).double(), *values.values()], 1)
    left_out = [  # plain loop
        mode[i] - x[i] @ torch.linalg.lstsq(x[torch.arange(400) != i], mode[torch.arange(400) != i]).solution
        for i in range(400)
    ]
    expected = 1 - torch.stack(left_out).square().sum() / (mode - mode.mean()).square().sum()
    torch.testing.assert_close(attributes.explained_share(mode, values), expected[None])


def test_views_differ_in_one_parameter():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parameters = AugmentationParameters.of("standard")
    views = variations.varied_views(image, parameters, 16)
    assert list(views) == list(variations.parameter_ranges(parameters)) and json.dumps(
        variations.parameter_ranges(parameters)
    )
    middle = views["flip"][0]
    torch.testing.assert_close(views["flip"][1], middle.flip(-1))
    for name in ("brightness", "contrast", "saturation", "hue"):  # the middle of three levels is the identity
        torch.testing.assert_close(views[name][1], middle, rtol=0, atol=1e-5)
        assert (views[name][0] - views[name][2]).abs().mean() > 0.01
    torch.testing.assert_close(views["grayscale"][0], middle)
    assert (views["grayscale"][1][0] == views["grayscale"][1][2]).all()
    assert views["blur"][2].std() < views["blur"][1].std() < views["blur"][0].std()
    assert list(variations.varied_views(image, AugmentationParameters.of("weak"), 16)) == list(views)[:4]
