"""Data types of losses, autocast, and SimCLR at temperatures too low for float32."""

import pytest
import torch
from test_losses import every_loss, views

from stepwise_lightning import BarlowTwins, SimCLR, SpectralContrastive, VICReg, simclr_loss


@every_loss
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_half_precision_is_computed_in_float32(loss, loop, arguments, kind, scale):
    halves = [(scale * z).to(kind).requires_grad_() for z in views(n=64, d=16)]
    singles = [z.detach().float().requires_grad_() for z in halves]
    value, expected = loss(*halves, *arguments), loss(*singles, *arguments)
    assert value.dtype == torch.float32 and value.isfinite() and torch.equal(value, expected)
    gradients = [torch.autograd.grad(value, halves), torch.autograd.grad(expected, singles)]
    for half, single in zip(*gradients, strict=True):
        assert half.dtype == kind and torch.equal(half, single.to(kind))


@every_loss
def test_views_of_two_types_are_promoted(loss, loop, arguments):
    z1, z2 = views()
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        narrow = z1.to(kind)
        assert torch.equal(loss(narrow, z2, *arguments), loss(narrow.double(), z2, *arguments))
        assert torch.equal(loss(z2, narrow, *arguments), loss(z2, narrow.double(), *arguments))
    mixed = loss(z1.half(), z2.bfloat16(), *arguments)
    assert torch.equal(mixed, loss(z1.half().float(), z2.bfloat16().float(), *arguments))


@every_loss
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_losses(loss, loop, arguments, kind):
    z1, z2 = (z.float().requires_grad_() for z in views(n=64, d=16))
    expected = loss(z1, z2, *arguments)
    with torch.autocast("cpu", kind):
        value = loss(z1, z2, *arguments)
        assert torch.is_autocast_enabled("cpu")
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    for gradient, target in zip(
        torch.autograd.grad(value, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True
    ):
        assert torch.equal(gradient, target)


@pytest.mark.parametrize("method", [BarlowTwins, SimCLR, SpectralContrastive, VICReg])
def test_autocast_does_not_change_the_loss_of_a_module(method):
    z1, z2 = (z.float() for z in views(n=64, d=16))
    model = method(torch.nn.Identity(), learning_rate=0.1)
    expected = model.loss(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.loss(z1, z2), expected)


@every_loss
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("level", [0.0, 10.0])
def test_collapsed_embeddings_have_finite_losses_and_gradients(loss, loop, arguments, kind, level):
    z1, z2 = (torch.full((8, 4), level, dtype=kind, requires_grad=True) for _ in range(2))
    value = loss(z1, z2, *arguments)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (z1, z2)))


@every_loss
def test_integers_complex_numbers_and_two_devices_raise(loss, loop, arguments):
    z1, z2 = views()
    for kind, convert in ((torch.int64, "float()"), (torch.bool, "float()"), (torch.complex64, "view_as_real")):
        for pair in ((z1.to(kind), z2), (z1, z2.to(kind))):
            with pytest.raises(ValueError, match=f"real floating type.* {kind}") as error:
                loss(*pair, *arguments)
            assert convert in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be on one device, got cpu and meta: move one"):
        loss(z1, z2.to("meta"), *arguments)


# ---- SimCLR at small temperatures ----
def exact_simclr(z1, z2, temperature):
    """Return NT-Xent in float64, with the loss of a view as log(1 + Σ_k exp((s_ik − s_ij)/τ)) over negatives k."""
    z = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    n, total = len(z1), 0.0
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = torch.tensor([k for k in range(2 * n) if k not in (i, positive)])
        exponents = ((z[others] - z[positive]) @ z[i]) / temperature
        total += float(torch.nn.functional.softplus(exponents.logsumexp(0))) / (2 * n)
    return total


@pytest.mark.parametrize("temperature", [1e-8, 1e-3, 0.05, 0.5, 10.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_simclr_is_exact_and_never_negative_at_any_temperature(temperature, kind):
    z1, z2 = (z.to(kind) for z in views(n=16, d=8))
    close = z1 + (1e-3 * z2).to(kind)
    for a, b in ((z1, z2), (z1, z1), (z1, close), (z1[:1].expand(16, 8), z1[:1].expand(16, 8))):
        a, b = (z.clone().requires_grad_() for z in (a, b))
        value, expected = simclr_loss(a, b, temperature), exact_simclr(a.detach(), b.detach(), temperature)
        assert value.dtype == (torch.float64 if kind == torch.float64 else torch.float32) and value >= 0
        rounding = 1e-11 if kind == torch.float64 else 1e-5
        noise = 1e-14 / temperature if temperature < 0.05 else rounding
        assert value.item() == pytest.approx(expected, rel=rounding, abs=noise)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (a, b)))


def test_round_off_does_not_make_simclr_negative():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        z = torch.randn(8, 64, generator=generator)
        for temperature in (0.05, 0.06, 0.08, 0.1):
            assert 0 <= simclr_loss(z, z + 1e-4 * torch.randn(8, 64, generator=generator), temperature) < 0.1


def test_simclr_excludes_a_view_from_its_negatives():
    z = torch.eye(4)
    for temperature in (1e-5, 0.5):
        expected = exact_simclr(z, z.roll(1, 0), temperature)
        assert simclr_loss(z, z.roll(1, 0), temperature).item() == pytest.approx(expected, rel=1e-6)
