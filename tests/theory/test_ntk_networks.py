"""Tangent kernels of many kinds of networks equal explicit Jacobians."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from example_networks import (
    IMAGES,
    SEQUENCES,
    TOKENS,
    VECTORS,
    custom,
    explicit_kernel,
    inner_products,
    jacobian,
    linear,
    with_deprecated_norm,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from stepwise_lightning.theory import EmpiricalNTK


def tied(forward=lambda self, x: F.linear(self.inner(x).tanh(), self.inner.weight.t()), **more) -> nn.Module:
    return custom(forward, inner=linear(6, 4), **more)


def tied_by_name() -> nn.Module:
    module = custom(lambda self, x: self.outer(self.inner(x).tanh()), inner=linear(), outer=linear())
    module.outer.weight = module.inner.weight
    return module


def same_layer_twice() -> nn.Module:
    layer = linear()
    return nn.Sequential(layer, nn.Tanh(), layer)


class Symmetrize(nn.Module):
    """Return W + Wᵀ."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.T


def parametrized() -> nn.Module:
    module = nn.Sequential(linear(), nn.Tanh(), linear())
    parametrize.register_parametrization(module[0], "weight", Symmetrize())
    return module


class StraightThrough(torch.autograd.Function):
    """Rounding with an identity gradient, which vmap does not support."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def count_in_place(self, x):
    self.calls += 1
    return self.inner(x)


def count_out_of_place(self, x):
    self.calls = self.calls + 1
    return self.inner(x)


def route_by_sign(self, x):
    """Two experts for positive and negative samples."""
    result = x.new_zeros(len(x), 4)
    for expert, rows in ((self.positive, x[:, 0] > 0), (self.negative, x[:, 0] <= 0)):
        result[rows] = expert(x[rows])
    return result


def double(_layer, _args, output):
    return 2 * output


def hooked() -> nn.Module:
    module = nn.Sequential(linear(), nn.Tanh(), linear())
    module[2].register_forward_hook(double)
    return module


def reuse_for_outliers(self, x):
    """Apply the inner layer to every sample, and its weights again to outliers."""
    h = self.inner(x).tanh()
    return torch.where(x[:, :1] > 1e3, F.linear(h, self.inner.weight), h)


NETWORKS = {
    # shared weights
    "tied by function": (tied, VECTORS),
    "tied, with bias": (
        lambda: tied(
            lambda s, x: F.linear(s.inner(x).relu(), s.inner.weight.t(), s.last), last=nn.Parameter(torch.ones(6))
        ),
        VECTORS,
    ),
    "tied by name": (tied_by_name, VECTORS),
    "weight penalty in the output": (
        lambda: tied(lambda s, x: s.inner(x).tanh() + 0.1 * s.inner.weight.square().sum()),
        VECTORS,
    ),
    "bias shared": (lambda: tied(lambda s, x: s.inner(x).tanh() * s.inner.bias), VECTORS),
    "weight used before its layer": (
        lambda: tied(lambda s, x: s.inner((x @ s.inner.weight.t()) @ s.inner.weight)),
        VECTORS,
    ),
    "weight shared for outliers": (lambda: custom(reuse_for_outliers, inner=linear()), VECTORS),
    "layer with a detached output": (
        lambda: tied(lambda s, x: s.inner(x).detach() + F.linear(x, s.inner.weight)),
        VECTORS,
    ),
    "layer called twice": (lambda: custom(lambda s, x: s.inner(s.inner(x).tanh()), inner=linear()), VECTORS),
    "layer under two names": (same_layer_twice, VECTORS),
    "layer never called": (lambda: custom(lambda s, x: s.a(x), a=linear(), b=linear(6, 2)), VECTORS),
    "layer on a sequence": (lambda: nn.Sequential(linear(), nn.Tanh(), linear(6, 2)), SEQUENCES),
    "layer on flattened sequences": (
        lambda: custom(lambda s, x: s.a(x.flatten(0, 1)).unflatten(0, (-1, 3)), a=linear()),
        SEQUENCES,
    ),
    "layer on reordered samples": (lambda: custom(lambda s, x: s.a(x.flip(0)).flip(0), a=linear()), VECTORS),
    "layer called with a keyword": (lambda: custom(lambda s, x: s.a(input=x), a=linear()), VECTORS),
    "layer with a hook": (hooked, VECTORS),
    "experts": (lambda: custom(route_by_sign, positive=linear(6, 4), negative=linear(6, 4)), VECTORS),
    "checkpointed": (
        lambda: custom(
            lambda s, x: checkpoint(s.a, x, use_reentrant=False), a=nn.Sequential(linear(), nn.Tanh(), linear())
        ),
        VECTORS,
    ),
    "linear alone": (linear, VECTORS),
    # computed weights
    "deprecated weight_norm": (lambda: with_deprecated_norm(nn.utils.weight_norm), VECTORS),
    "deprecated spectral_norm": (lambda: with_deprecated_norm(nn.utils.spectral_norm), VECTORS),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear()), VECTORS),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(linear()), nn.Tanh(), linear()).eval(),
        VECTORS,
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), VECTORS),
    "custom parametrization": (parametrized, VECTORS),
    # parameters
    "zero-dimensional": (
        lambda: custom(lambda s, x: s.scale * s.inner(x).tanh(), inner=linear(), scale=nn.Parameter(torch.tensor(0.7))),
        VECTORS,
    ),
    "only zero-dimensional": (
        lambda: custom(lambda s, x: (s.scale * x).tanh(), scale=nn.Parameter(torch.tensor(0.7))),
        VECTORS,
    ),
    "empty": (lambda: custom(lambda s, x: s.inner(x), inner=linear(), none=nn.Parameter(torch.ones(0))), VECTORS),
    "frozen": (lambda: nn.Sequential(linear().requires_grad_(False), nn.Tanh(), linear(6, 2)), VECTORS),
    "list": (
        lambda: custom(lambda s, x: sum(p * x for p in s.many), many=nn.ParameterList([torch.ones(6), torch.ones(1)])),
        VECTORS,
    ),
    "float16": (lambda: nn.Sequential(linear(), nn.Tanh(), linear(6, 2)).half(), VECTORS),
    "bfloat16": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), linear(32, 2)).bfloat16(), IMAGES),
    # outputs
    "scalar output": (lambda: custom(lambda s, x: s.inner(x).sum(1), inner=linear()), VECTORS),
    "squeezed": (lambda: custom(lambda s, x: s.inner(x).squeeze(), inner=linear(6, 1)), VECTORS),
    "squeezed rows": (lambda: custom(lambda s, x: s.inner(x).squeeze(), inner=linear(6, 3)), VECTORS),
    "output without parameters": (lambda: custom(lambda s, x: torch.cat([s.inner(x), x], 1), inner=linear()), VECTORS),
    # layers
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), linear(20, 3)), TOKENS),
    "embedding with padding": (
        lambda: nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Flatten(), linear(20, 3)),
        TOKENS,
    ),
    "sparse embedding": (lambda: nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Flatten(), linear(20, 3)), TOKENS),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 5), nn.Tanh(), linear(5, 3)), TOKENS),
    "integers": (lambda: custom(lambda s, x: s.a(x.to(s.a.weight.dtype)).tanh(), a=linear(4, 3)), TOKENS),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(), SEQUENCES),
    "attention": (
        lambda: custom(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)),
        SEQUENCES,
    ),
    "recurrent": (lambda: custom(lambda s, x: s.a(x)[0], a=nn.LSTM(6, 4, batch_first=True)), SEQUENCES),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()), IMAGES),
    "instance norm in training": (lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 2, 3)), IMAGES),
    "instance norm with statistics": (
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Conv2d(3, 2, 3)),
        IMAGES,
    ),
    "batch norm in evaluation": (lambda: nn.Sequential(linear(), nn.BatchNorm1d(6), nn.Tanh()).eval(), VECTORS),
    "complex inside": (lambda: custom(lambda s, x: torch.fft.fft(s.inner(x)).real, inner=linear()), VECTORS),
    "buffer changed in place": (lambda: custom(count_in_place, inner=linear(), calls=torch.tensor(0)), VECTORS),
    "buffer replaced": (lambda: custom(count_out_of_place, inner=linear(), calls=torch.tensor(0.0)), VECTORS),
    "data-dependent branch": (
        lambda: custom(
            lambda s, x: torch.cat([s.inner(v[None]) if v.sum() > 0 else -s.inner(v[None]).tanh() for v in x]),
            inner=linear(),
        ),
        VECTORS,
    ),
    "custom autograd function": (
        lambda: custom(lambda s, x: s.b(StraightThrough.apply(s.a(x))), a=linear(), b=linear(6, 2)),
        VECTORS,
    ),
    "in-place operations": (
        lambda: custom(lambda s, x: s.b(s.a(x).add_(1).relu_()), a=linear(), b=linear(6, 2)),
        VECTORS,
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_equals_explicit_jacobian_and_module_is_unchanged(name):
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    module = make()
    gradients = jacobian(module, x)
    expected = inner_products(gradients, gradients)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    kernel = EmpiricalNTK(module)
    for left, right in ((x, x), (x[:1], x[1:]), (x[2:], x[:3])):
        rows, columns = ([int((x == point).flatten(1).all(1).nonzero()[0]) for point in z] for z in (left, right))
        torch.testing.assert_close(kernel(left, right), expected[rows][:, columns], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    copy.deepcopy(module)
    names = [key for key, _ in module.named_parameters()]
    for some in (names[:1], names[-1:], names[::2]):
        columns = torch.cat([torch.full((p.numel(),), key in some) for key, p in module.named_parameters()])
        expected = inner_products(gradients[:, :, columns], gradients[:, :, columns])
        torch.testing.assert_close(EmpiricalNTK(module, some)(x, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tied_by_name, ["inner.weight", "outer.bias"]),
        (lambda: with_deprecated_norm(nn.utils.weight_norm), ["2.bias", "2.weight_g", "2.weight_v"]),
        (lambda: nn.Sequential(linear(), parametrizations.weight_norm(linear())), None),
    ],
    ids=["tied", "deprecated weight_norm", "weight_norm"],
)
def test_last_selects_tied_and_parametrized_weights_of_the_last_layer(make, names):
    module = make()
    names = names or [name for name, _ in module.named_parameters() if name.startswith("1.")]
    expected = explicit_kernel(module, VECTORS, VECTORS, names)
    torch.testing.assert_close(EmpiricalNTK(module, "last")(VECTORS, VECTORS), expected, rtol=1e-10, atol=1e-12)


def test_identical_samples_are_computed_one_at_a_time():
    """Identical samples cannot reveal that the module reads only the first; a batch would count it four times."""
    module = custom(lambda self, x: self.inner(x[:1].expand_as(x)), inner=linear())
    copies = VECTORS[:1].expand(4, -1)
    expected = explicit_kernel(module, copies, copies)
    torch.testing.assert_close(EmpiricalNTK(module)(copies, copies), expected, rtol=1e-10, atol=1e-12)


def test_repeated_parameter_names_count_once():
    expected = explicit_kernel(linear(), VECTORS, VECTORS)
    kernel = EmpiricalNTK(linear(), ["weight", "bias", "weight"])
    torch.testing.assert_close(kernel(VECTORS, VECTORS), expected, rtol=1e-10, atol=1e-12)


def test_initialized_lazy_layers_are_supported():
    module = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), linear(3, 3))
    kernel = EmpiricalNTK(module)
    module(VECTORS.float())
    torch.testing.assert_close(
        kernel(VECTORS, VECTORS), explicit_kernel(module, VECTORS, VECTORS), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["tied by function", "zero-dimensional", "layer on a sequence"])
def test_grad_modes_and_autocast_do_not_change_the_kernel(context, name):
    make, x = NETWORKS[name]
    module = make()
    expected = {dtype: EmpiricalNTK(module, dtype=dtype)(x, x) for dtype in (torch.float64, torch.float32)}
    with context():
        inputs = x.clone()
        for dtype, values in expected.items():
            assert torch.equal(EmpiricalNTK(module, dtype=dtype)(inputs, inputs), values)
