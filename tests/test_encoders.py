"""Shapes and sizes of encoders, small initialisation, and seeds."""

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
    [("resnet_small", 64, 77_352), ("resnet18", 512, 11_168_832),
     pytest.param("resnet34", 512, 21_276_992, marks=pytest.mark.slow),
     pytest.param("resnet50", 2048, 23_500_352, marks=pytest.mark.slow)],
)  # fmt: skip
def test_resnet_sizes(name, width, parameters):
    network = ResNet(name)
    assert network.out_features == width
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(images()).shape == (4, width)


def test_encoder_sets_the_width_of_the_small_resnet():
    wide = Encoder(3, width=16, seed=0)
    channels = [stage[0].conv1.out_channels for stage in [*wide.backbone.network.children()][4:8]]
    assert channels == [16, 32, 64, 128] and wide(images()).shape == (4, 3)
    assert equal(Encoder(3, width=8, seed=0), Encoder(3, seed=0))


def test_small_image_stem_preserves_the_resolution():
    sizes = {}
    for small in (True, False):
        network = ResNet("resnet18", small_images=small).network
        network.layer1.register_forward_hook(lambda _, __, out, small=small: sizes.update({small: out.shape[-1]}))
        network(images(size=64))
    assert sizes == {True: 64, False: 16}


@pytest.mark.parametrize(("depth", "norm"), [(1, "batch"), (3, "batch"), (2, "none")])
def test_projector_layers(depth, norm):
    projector = Projector(12, 5, depth, hidden_features=7, norm=norm)
    assert projector(torch.ones(4, 12)).shape == (4, 5)
    kinds = [type(layer) for layer in projector]
    assert kinds.count(nn.Linear) == depth and kinds[-1] is nn.Linear
    assert kinds.count(nn.BatchNorm1d) == (depth - 1 if norm == "batch" else 0)


def test_mlp_shapes():
    mlp = MLP(12, [8, 6], 3)
    assert mlp(torch.ones(5, 3, 2, 2)).shape == (5, 3)
    assert sum(p.numel() for p in MLP(12, [8], 3, bias=False).parameters()) == 12 * 8 + 8 * 3


def test_linear_encoder_weights_and_output():
    before = torch.get_rng_state()
    encoder = LinearEncoder(12, 3, init_std=1e-3, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(encoder.weight, LinearEncoder(12, 3, init_std=1e-3, seed=4).weight)
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(x), torch.nn.functional.linear(x.flatten(1), encoder.weight))
    ordinary = LinearEncoder(1200, 10).weight.detach()
    assert ordinary.abs().max() <= 1200**-0.5
    assert float(ordinary.std()) == pytest.approx((3 * 1200) ** -0.5, rel=0.03)
    for arguments in ((0, 3), (3, 0), (3, 3, -1.0), (3, 3, math.nan)):
        with pytest.raises(ValueError, match="≥"):
            LinearEncoder(*arguments)


@pytest.mark.parametrize(
    "build",
    [lambda seed: Encoder(4, projector_depth=2, seed=seed), lambda seed: MLP(12, [8], 3, seed=seed),
     lambda seed: LinearEncoder(12, 3, seed=seed), lambda seed: Encoder(4, bias_norm=1.0, seed=seed)],
)  # fmt: skip
def test_weights_depend_only_on_the_seed(build):
    state = torch.get_rng_state()
    first = build(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    assert equal(first, build(1)) and not equal(first, build(2))


def test_backbone_weights_do_not_depend_on_the_projector():
    a, b = Encoder(4, projector_depth=1), Encoder(9, projector_depth=3, norm="none", alpha=1e-3)
    assert equal(a.backbone, b.backbone)


def test_alpha_scales_only_the_embedding():
    ordinary, small = Encoder(6, projector_depth=2).double(), Encoder(6, projector_depth=2, alpha=1e-4).double()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(small(x), 1e-4 * ordinary(x), rtol=1e-5, atol=0)
    assert equal(ordinary.backbone, small.backbone)


def test_bias_norm_sets_the_norm_of_the_bias():
    last = Encoder(6, alpha=1e-4, bias_norm=1.0).projector[-1]
    assert last.bias.norm().item() == pytest.approx(1) and (last.bias != 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResNet("resnet19"), "choose from: resnet_small, resnet18"),
        (lambda: ResNet("resnet18", width=16), "None unless the network is resnet_small, got 16"),
        (lambda: Encoder(0), r"must be at least 1, got \(64, 0,"),
        (lambda: Encoder(3, projector_depth=0), r"depth .* must be at least 1, got \(64, 3, 0,"),
        (lambda: Projector(3, 3, norm="layer"), "'batch' or 'none'"),
        (lambda: MLP(3, [0], 3), "width of at least 1"),
        (lambda: scale_last_layer(nn.ReLU(), 0.1), "no linear layer"),
        (lambda: Encoder(3, alpha=0.0), "alpha must be positive"),
        (lambda: Encoder(3, alpha=math.nan), "alpha must be positive"),
        (lambda: scale_last_layer(nn.Linear(2, 2, bias=False), 1.0, bias_norm=1.0), "with a bias"),
    ],
)
def test_invalid_arguments_raise_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [1, 2])
def test_autocast_preserves_small_differences_of_embeddings_beside_a_large_bias(depth):
    """SimCLR starts there: the norm of the bias is 1, the spread of the embeddings 1e-3."""
    encoder = Encoder(4, alpha=1e-3, bias_norm=1.0, projector_depth=depth, seed=0)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
    assert rounded.dtype == torch.float32
    spread = exact - exact.mean(0)
    assert 1e-4 < spread.norm(dim=1).mean() < 1e-2
    assert (rounded - rounded.mean(0) - spread).norm() < 0.05 * spread.norm()
