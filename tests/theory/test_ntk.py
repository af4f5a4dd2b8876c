"""The empirical tangent kernel equals explicit Jacobians, a closed form, and the infinite-width limit."""

import pytest
import torch
from example_networks import explicit_kernel
from torch import Tensor, nn

from stepwise_lightning.encoders import MLP, Encoder
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, relu_ntk


class Shared(nn.Module):
    """One linear layer called twice, another on a sequence, a bare parameter and an output with two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.each, self.scale = nn.Linear(6, 6), nn.Linear(3, 4, bias=False), nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x.flatten(1)).tanh())
        return self.each(x.unflatten(1, (2, 3))) * self.scale


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    images = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    resnet = Encoder(3, "resnet_small", projector_depth=2, hidden_features=5)
    resnet(torch.randn(16, 3, 8, 8))  # sets the running statistics
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2))
    return {
        "mlp": (MLP(192, [16, 8], 3), images),
        "no bias": (MLP(192, [16], 3, bias=False), images),
        "convolution": (convolution, images),
        "resnet": (resnet, images),
        "shared": (Shared(), torch.randn(7, 6, dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("max_bytes", [2**30, 8 * 2 * 4 * 80_000])
def test_kernel_equals_explicit_jacobians(name, max_bytes):
    module, x = networks()[name]
    module = module.double().eval()
    kernel = EmpiricalNTK(module, max_bytes=max_bytes)
    torch.testing.assert_close(kernel(x, x), explicit_kernel(module, x, x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kernel(x[:4], x[3:]), explicit_kernel(module, x[:4], x[3:]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_selected_parameters(name):
    module, x = networks()[name]
    module = module.double().eval()
    names = [name for name, _ in module.named_parameters()]
    torch.testing.assert_close(
        EmpiricalNTK(module, "last")(x, x), explicit_kernel(module, x, x, names[-2:]), rtol=1e-10, atol=0
    )
    some = [names[0], names[-1]]
    torch.testing.assert_close(
        EmpiricalNTK(module, some)(x, x), explicit_kernel(module, x, x, some), rtol=1e-10, atol=0
    )


def test_float32_is_accurate_to_1e5_and_module_is_unchanged():
    module, x = networks()["resnet"]
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    single, double = EmpiricalNTK(module, dtype=torch.float32)(x, x), EmpiricalNTK(module)(x, x)
    assert single.dtype == double.dtype == torch.float64
    assert (single - double).norm() < 1e-5 * double.norm() and not torch.equal(single, double)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_kernel_uses_current_parameters():
    module, x = networks()["mlp"]
    kernel = EmpiricalNTK(module)
    first = kernel(x, x)
    with torch.no_grad():
        module[-1].weight.mul_(2)
    assert not torch.allclose(kernel(x, x), first)


def test_one_hidden_layer_has_a_closed_form():
    """K = (x·x' + 1) Σ_o Σ_h w_oh² σ'σ'/d + σ·σ' + 1 for f_o = Σ_h w_oh σ(u_h·x + b_h) + c_o."""
    module = MLP(5, [300], 4, seed=3).double()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = module[1](x)
    active = (hidden > 0).double()
    squares = module[3].weight.square().mean(0)
    expected = (x @ x.T + 1) * ((active * squares) @ active.T) + hidden.relu() @ hidden.relu().T + 1
    torch.testing.assert_close(EmpiricalNTK(module)(x, x), expected, rtol=1e-12, atol=0)


def test_wide_network_approaches_infinite_width_kernel():
    width, generator = 20_000, torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)

    class Wide(nn.Module):
        """NTK parametrisation: weights of unit variance, scaled in the forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, width, bias=False), nn.Linear(width, 1, bias=False)
            for layer in (self.inner, self.outer):
                nn.init.normal_(layer.weight, generator=generator)

        def forward(self, z: Tensor) -> Tensor:
            return self.outer((2 / width) ** 0.5 * self.inner(z).relu())

    exact = relu_ntk(x, x)
    assert (EmpiricalNTK(Wide().double())(x, x) - exact).norm() < 0.03 * exact.norm()


def test_arrays_and_lists_equal_tensors():
    module = MLP(5, [4], 3, seed=0)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = EmpiricalNTK(module)
    for convert in (Tensor.numpy, Tensor.tolist):
        array = convert(x)
        assert torch.equal(kernel(array, array), kernel(x, x))
        assert torch.equal(kernel(array, convert(x[:2])), kernel(x, x[:2]))


def test_contrastive_kernel_pca_accepts_empirical_ntk():
    module, x = networks()["resnet"]
    module.eval()
    generator = torch.Generator().manual_seed(0)
    other = x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    model = ContrastiveKernelPCA(EmpiricalNTK(module), 2).fit(x, other)
    assert model.loss(x, other) < 1e-12


def test_invalid_arguments_raise_one_clear_line():
    module, x = networks()["resnet"]
    with pytest.raises(ValueError, match=r"'backbone.network.bn1' \(BatchNorm2d\) is in training mode.*call eval\(\)"):
        EmpiricalNTK(module)(x, x)
    with pytest.raises(ValueError, match="Dropout.* is in training mode"):
        EmpiricalNTK(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="max_bytes 1000 cannot hold the gradients of a pair: use at least [0-9]{6}"):
        EmpiricalNTK(module.eval(), max_bytes=1000)(x, x)
    with pytest.raises(ValueError, match=r"unknown parameters \['weigth'\]: use 'all', 'last' or names among backbone"):
        EmpiricalNTK(module, ["weigth"])
    with pytest.raises(ValueError, match="float32 or torch.float64, got torch.float16"):
        EmpiricalNTK(module, dtype=torch.float16)
    with pytest.raises(ValueError, match="module must be a torch.nn.Module, got str"):
        EmpiricalNTK("resnet18")
    for empty, layers in ((nn.Conv2d(1, 1, 1), "last"), (nn.ReLU(), "all")):
        with pytest.raises(ValueError, match="has no (linear layer|parameters)"):
            EmpiricalNTK(empty, layers)
