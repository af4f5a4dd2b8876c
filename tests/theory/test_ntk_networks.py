"""Kinds of networks under the tangent kernel: each equals the full Jacobian, or is refused in one line."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from example_networks import IMAGES, SEQUENCES, TOKENS, VECTORS, brute_force, linear, made, with_old
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from stepwise_lightning.theory import EmpiricalNTK


def tied(forward=lambda self, x: F.linear(self.inner(x).tanh(), self.inner.weight.t()), **more) -> nn.Module:
    return made(forward, inner=linear(6, 4), **more)


def tied_by_name() -> nn.Module:
    module = made(lambda self, x: self.outer(self.inner(x).tanh()), inner=linear(), outer=linear())
    module.outer.weight = module.inner.weight
    return module


def same_layer_twice() -> nn.Module:
    layer = linear()
    return nn.Sequential(layer, nn.Tanh(), layer)


class Double(nn.Module):
    """W + Wᵀ."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.T


def parametrized() -> nn.Module:
    module = nn.Sequential(linear(), nn.Tanh(), linear())
    parametrize.register_parametrization(module[0], "weight", Double())
    return module


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients on; vmap cannot take it."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def count(self, x):
    self.calls += 1
    return self.inner(x)


def counted_anew(self, x):
    self.calls = self.calls + 1
    return self.inner(x)


def by_sign(self, x):
    """Two experts, of which each gets the samples of its sign."""
    result = x.new_zeros(len(x), 4)
    for expert, rows in ((self.positive, x[:, 0] > 0), (self.negative, x[:, 0] <= 0)):
        result[rows] = expert(x[rows])
    return result


def doubled(part, _given, output):
    return 2 * output


def hooked() -> nn.Module:
    module = nn.Sequential(linear(), nn.Tanh(), linear())
    module[2].register_forward_hook(doubled)
    return module


def one_expert_seldom(self, x):
    """Every sample goes through the inner layer, and those far out through its weights again."""
    h = self.inner(x).tanh()
    return torch.where(x[:, :1] > 1e3, F.linear(h, self.inner.weight), h)


RIGHT = {
    # weights that are used again
    "tied by function": (tied, VECTORS),
    "tied, with bias": (
        lambda: tied(
            lambda s, x: F.linear(s.inner(x).relu(), s.inner.weight.t(), s.last), last=nn.Parameter(torch.ones(6))
        ),
        VECTORS,
    ),
    "tied by name": (tied_by_name, VECTORS),
    "used again outside its layer": (
        lambda: tied(lambda s, x: s.inner(x).tanh() + 0.1 * s.inner.weight.square().sum()),
        VECTORS,
    ),
    "bias used again": (lambda: tied(lambda s, x: s.inner(x).tanh() * s.inner.bias), VECTORS),
    "used before its layer": (lambda: tied(lambda s, x: s.inner((x @ s.inner.weight.t()) @ s.inner.weight)), VECTORS),
    "used again, rarely": (lambda: made(one_expert_seldom, inner=linear()), VECTORS),
    "layer whose output is cut off": (
        lambda: tied(lambda s, x: s.inner(x).detach() + F.linear(x, s.inner.weight)),
        VECTORS,
    ),
    "layer called twice": (lambda: made(lambda s, x: s.inner(s.inner(x).tanh()), inner=linear()), VECTORS),
    "layer in two places": (same_layer_twice, VECTORS),
    "layer never called": (lambda: made(lambda s, x: s.a(x), a=linear(), b=linear(6, 2)), VECTORS),
    "layer on a sequence": (lambda: nn.Sequential(linear(), nn.Tanh(), linear(6, 2)), SEQUENCES),
    "layer on flattened sequences": (
        lambda: made(lambda s, x: s.a(x.flatten(0, 1)).unflatten(0, (-1, 3)), a=linear()),
        SEQUENCES,
    ),
    "layer on another order": (lambda: made(lambda s, x: s.a(x.flip(0)).flip(0), a=linear()), VECTORS),
    "layer by keyword": (lambda: made(lambda s, x: s.a(input=x), a=linear()), VECTORS),
    "layer with a hook": (hooked, VECTORS),
    "experts": (lambda: made(by_sign, positive=linear(6, 4), negative=linear(6, 4)), VECTORS),
    "checkpointed": (
        lambda: made(
            lambda s, x: checkpoint(s.a, x, use_reentrant=False), a=nn.Sequential(linear(), nn.Tanh(), linear())
        ),
        VECTORS,
    ),
    "linear alone": (linear, VECTORS),
    # weights that are computed
    "old weight_norm": (lambda: with_old(nn.utils.weight_norm), VECTORS),
    "old spectral_norm": (lambda: with_old(nn.utils.spectral_norm), VECTORS),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear()), VECTORS),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(linear()), nn.Tanh(), linear()).eval(),
        VECTORS,
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), VECTORS),
    "own parametrization": (parametrized, VECTORS),
    # parameters
    "zero-dimensional": (
        lambda: made(lambda s, x: s.scale * s.inner(x).tanh(), inner=linear(), scale=nn.Parameter(torch.tensor(0.7))),
        VECTORS,
    ),
    "only zero-dimensional": (
        lambda: made(lambda s, x: (s.scale * x).tanh(), scale=nn.Parameter(torch.tensor(0.7))),
        VECTORS,
    ),
    "empty": (lambda: made(lambda s, x: s.inner(x), inner=linear(), none=nn.Parameter(torch.ones(0))), VECTORS),
    "frozen": (lambda: nn.Sequential(linear().requires_grad_(False), nn.Tanh(), linear(6, 2)), VECTORS),
    "list": (
        lambda: made(lambda s, x: sum(p * x for p in s.many), many=nn.ParameterList([torch.ones(6), torch.ones(1)])),
        VECTORS,
    ),
    "float16": (lambda: nn.Sequential(linear(), nn.Tanh(), linear(6, 2)).half(), VECTORS),
    "bfloat16": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), linear(32, 2)).bfloat16(), IMAGES),
    # outputs
    "one output without an axis": (lambda: made(lambda s, x: s.inner(x).sum(1), inner=linear()), VECTORS),
    "squeezed": (lambda: made(lambda s, x: s.inner(x).squeeze(), inner=linear(6, 1)), VECTORS),
    "squeezed rows": (lambda: made(lambda s, x: s.inner(x).squeeze(), inner=linear(6, 3)), VECTORS),
    "output without parameters": (lambda: made(lambda s, x: torch.cat([s.inner(x), x], 1), inner=linear()), VECTORS),
    # layers
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), linear(20, 3)), TOKENS),
    "embedding with padding": (
        lambda: nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Flatten(), linear(20, 3)),
        TOKENS,
    ),
    "sparse embedding": (lambda: nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Flatten(), linear(20, 3)), TOKENS),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 5), nn.Tanh(), linear(5, 3)), TOKENS),
    "integers": (lambda: made(lambda s, x: s.a(x.to(s.a.weight.dtype)).tanh(), a=linear(4, 3)), TOKENS),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(), SEQUENCES),
    "attention": (
        lambda: made(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)),
        SEQUENCES,
    ),
    "recurrent": (lambda: made(lambda s, x: s.a(x)[0], a=nn.LSTM(6, 4, batch_first=True)), SEQUENCES),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()), IMAGES),
    "instance norm in training": (lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 2, 3)), IMAGES),
    "instance norm with statistics": (
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Conv2d(3, 2, 3)),
        IMAGES,
    ),
    "batch norm in evaluation": (lambda: nn.Sequential(linear(), nn.BatchNorm1d(6), nn.Tanh()).eval(), VECTORS),
    "complex inside": (lambda: made(lambda s, x: torch.fft.fft(s.inner(x)).real, inner=linear()), VECTORS),
    "calls counted": (lambda: made(count, inner=linear(), calls=torch.tensor(0)), VECTORS),
    "calls counted anew": (lambda: made(counted_anew, inner=linear(), calls=torch.tensor(0.0)), VECTORS),
    "a branch on values": (
        lambda: made(
            lambda s, x: torch.cat([s.inner(v[None]) if v.sum() > 0 else -s.inner(v[None]).tanh() for v in x]),
            inner=linear(),
        ),
        VECTORS,
    ),
    "own gradient": (lambda: made(lambda s, x: s.b(Straight.apply(s.a(x))), a=linear(), b=linear(6, 2)), VECTORS),
    "in-place": (lambda: made(lambda s, x: s.b(s.a(x).add_(1).relu_()), a=linear(), b=linear(6, 2)), VECTORS),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", RIGHT)
def test_it_equals_the_full_jacobian_and_leaves_the_module_alone(name):
    make, x = RIGHT[name]
    torch.manual_seed(0)
    module = make()
    expected = brute_force(module, x, x)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    kernel = EmpiricalNTK(module)
    for left, right in ((x, x), (x[:1], x[1:]), (x[2:], x[:3])):
        rows, columns = ([int((x == point).flatten(1).all(1).nonzero()[0]) for point in z] for z in (left, right))
        torch.testing.assert_close(kernel(left, right), expected[rows][:, columns], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    copy.deepcopy(module)
    names = [key for key, _ in module.named_parameters()]
    for some in (names[:1], names[-1:], names[::2]):
        expected = brute_force(module, x, x, some)
        torch.testing.assert_close(EmpiricalNTK(module, some)(x, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tied_by_name, ["inner.weight", "outer.bias"]),
        (lambda: with_old(nn.utils.weight_norm), ["2.bias", "2.weight_g", "2.weight_v"]),
        (lambda: nn.Sequential(linear(), parametrizations.weight_norm(linear())), None),
    ],
    ids=["tied", "old weight_norm", "weight_norm"],
)
def test_the_last_layer_is_all_of_it_also_under_other_names(make, names):
    module = make()
    names = names or [name for name, _ in module.named_parameters() if name.startswith("1.")]
    expected = brute_force(module, VECTORS, VECTORS, names)
    torch.testing.assert_close(EmpiricalNTK(module, "last")(VECTORS, VECTORS), expected, rtol=1e-10, atol=1e-12)


def test_copies_of_one_sample_are_taken_one_by_one():
    """Among copies a look at the first one cannot be seen, and one pass for all of them would count it four times."""
    module = made(lambda self, x: self.inner(x[:1].expand_as(x)), inner=linear())
    copies = VECTORS[:1].expand(4, -1)
    expected = brute_force(module, copies, copies)
    torch.testing.assert_close(EmpiricalNTK(module)(copies, copies), expected, rtol=1e-10, atol=1e-12)


def test_a_name_given_twice_counts_once():
    expected = brute_force(linear(), VECTORS, VECTORS)
    kernel = EmpiricalNTK(linear(), ["weight", "bias", "weight"])
    torch.testing.assert_close(kernel(VECTORS, VECTORS), expected, rtol=1e-10, atol=1e-12)


def test_lazy_layers_are_taken_once_they_are_initialised():
    module = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), linear(3, 3))
    kernel = EmpiricalNTK(module)
    module(VECTORS.float())
    torch.testing.assert_close(kernel(VECTORS, VECTORS), brute_force(module, VECTORS, VECTORS), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("name", ["tied by function", "zero-dimensional", "layer on a sequence"])
def test_modes_around_the_call_change_nothing(context, name):
    make, x = RIGHT[name]
    module = make()
    expected = {dtype: EmpiricalNTK(module, dtype=dtype)(x, x) for dtype in (torch.float64, torch.float32)}
    with context():
        given = x.clone()
        for dtype, values in expected.items():
            assert torch.equal(EmpiricalNTK(module, dtype=dtype)(given, given), values)
