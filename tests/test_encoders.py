"""Shapes, sizes, small starts, and initial weights that depend on their seed alone."""

import math

import pytest
import torch
from torch import nn

from stepwise_lightning.encoders import MLP, Encoder, LinearEncoder, Projector, ResNet, scale_last_layer


def images(n=4, size=16, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [("resnet_small", 64, 77_352), ("resnet18", 512, 11_168_832), ("resnet34", 512, 21_276_992),
     ("resnet50", 2048, 23_500_352)],
)  # fmt: skip
def test_resnets(name, width, parameters):
    network = ResNet(name)
    assert network.out_features == width
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(images()).shape == (4, width)


def test_stems_keep_or_reduce_the_resolution():
    sizes = {}
    for small in (True, False):
        network = ResNet("resnet18", small_images=small).network
        network.layer1.register_forward_hook(lambda _, __, out, small=small: sizes.update({small: out.shape[-1]}))
        network(images(size=64))
    assert sizes == {True: 64, False: 16}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_projector(depth, norm):
    projector = Projector(12, 5, depth, hidden_features=7, norm=norm)
    assert projector(torch.ones(4, 12)).shape == (4, 5)
    kinds = [type(layer) for layer in projector]
    assert kinds.count(nn.Linear) == depth and kinds[-1] is nn.Linear
    assert kinds.count(nn.BatchNorm1d) == (depth - 1 if norm == "batch" else 0)


def test_mlp():
    mlp = MLP(12, [8, 6], 3)
    assert mlp(torch.ones(5, 3, 2, 2)).shape == (5, 3)
    assert sum(p.numel() for p in MLP(12, [8], 3, bias=False).parameters()) == 12 * 8 + 8 * 3


@pytest.mark.parametrize(
    "build",
    [lambda seed: Encoder(4, projector_depth=2, seed=seed), lambda seed: MLP(12, [8], 3, seed=seed),
     lambda seed: LinearEncoder(12, 3, seed=seed), lambda seed: Encoder(4, bias_norm=1.0, seed=seed)],
)  # fmt: skip
def test_weights_depend_on_the_seed_alone(build):
    state = torch.get_rng_state()
    first = build(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    assert equal(first, build(1)) and not equal(first, build(2))


def test_one_part_does_not_change_another():
    a, b = Encoder(4, projector_depth=1), Encoder(9, projector_depth=3, norm="none", alpha=1e-3)
    assert equal(a.backbone, b.backbone)


def test_small_start_scales_the_embedding_and_nothing_else():
    ordinary, small = Encoder(6, projector_depth=2).double(), Encoder(6, projector_depth=2, alpha=1e-4).double()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(small(x), 1e-4 * ordinary(x), rtol=1e-5, atol=0)
    assert equal(ordinary.backbone, small.backbone)


def test_bias_of_a_given_norm():
    last = Encoder(6, alpha=1e-4, bias_norm=1.0).projector[-1]
    assert last.bias.norm().item() == pytest.approx(1) and (last.bias != 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResNet("resnet19"), "choose from: resnet_small, resnet18"),
        (lambda: Encoder(0), "out_features=0"),
        (lambda: Encoder(3, projector_depth=0), "depth=0"),
        (lambda: Projector(3, 3, norm="layer"), "'batch' or 'none'"),
        (lambda: MLP(3, [0], 3), "width of at least 1"),
        (lambda: scale_last_layer(nn.ReLU(), 0.1), "no linear layer"),
        (lambda: Encoder(3, alpha=0.0), "alpha must be positive"),
        (lambda: Encoder(3, alpha=math.nan), "alpha must be positive"),
        (lambda: scale_last_layer(nn.Linear(2, 2, bias=False), 1.0, bias_norm=1.0), "with a bias"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
