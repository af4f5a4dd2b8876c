"""What the tangent kernel refuses: networks that are no function of one sample, or not one of real numbers."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from example_networks import SEQUENCES, TOKENS, VECTORS, linear, made, with_old
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stepwise_lightning.errors import UserError
from stepwise_lightning.theory import EmpiricalNTK


def remember(self, x):
    with torch.no_grad():
        self.average.mul_(0.9).add_(0.1 * x.mean())
    return self.inner(x - self.average)


def dropped(self, x):
    return self.inner(F.dropout(x))


def private_chance(self, x):
    return self.inner(x + torch.randn(x.shape, generator=GENERATOR).to(x))


def clipped(self, x):
    with torch.no_grad():
        self.inner.weight.mul_(0.5)
    return self.inner(x)


def attention_over_the_batch(self, x):
    return self.inner(F.softmax(x @ x.T, 1) @ x)


def across(self, x):
    return self.norm(self.inner(x))


class BatchMean(nn.Module):
    """Takes the mean of the batch off."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


GENERATOR = torch.Generator().manual_seed(0)
REFUSED = {
    "batch statistics": (
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(6, track_running_stats=False)).eval(),
        VECTORS,
        r"'1' \(BatchNorm1d\) has no running statistics and mixes samples also after eval\(\)",
    ),
    "batch norm in training": (
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(6)),
        VECTORS,
        r"'1' \(BatchNorm1d\) is in training mode",
    ),
    "functional batch norm": (
        lambda: made(lambda s, x: F.batch_norm(s.inner(x), None, None, training=True), inner=linear()),
        SEQUENCES,
        "Made mixes samples",
    ),
    "batch mean": (
        lambda: nn.Sequential(linear(), nn.Sequential(nn.Tanh(), BatchMean())),
        VECTORS,
        r"'1.1' \(BatchMean\) mixes samples",
    ),
    "attention over the batch": (lambda: made(attention_over_the_batch, inner=linear()), VECTORS, "Made mixes samples"),
    "attention with the batch second": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8).eval(),
        SEQUENCES,
        r"'self_attn' \(MultiheadAttention\) mixes samples",
    ),
    "recurrent with the batch second": (
        lambda: made(lambda s, x: s.a(x)[0], a=nn.GRU(6, 4)),
        SEQUENCES,
        r"'a' \(GRU\) mixes samples",
    ),
    "dropout": (lambda: nn.Sequential(linear(), nn.Dropout()), VECTORS, r"'1' \(Dropout\) is in training mode"),
    "functional dropout": (
        lambda: nn.Sequential(made(dropped, inner=linear()), nn.Tanh()),
        VECTORS,
        r"'0' \(Made\) draws random numbers",
    ),
    "random leaky relu": (lambda: nn.Sequential(linear(), nn.RReLU()), VECTORS, r"'1' \(RReLU\) draws random numbers"),
    "dropout in a recurrent layer": (
        lambda: made(lambda s, x: s.a(x)[0], a=nn.LSTM(6, 4, 2, dropout=0.5)),
        SEQUENCES,
        r"'a' \(LSTM\) draws random numbers",
    ),
    "a generator of its own": (
        lambda: made(private_chance, inner=linear()),
        VECTORS,
        "Made gives another output at each call",
    ),
    "spectral_norm in training": (
        lambda: nn.Sequential(parametrizations.spectral_norm(linear())),
        VECTORS,
        r"changes the buffers \['0.parametrizations.weight.0._u'",
    ),
    "old spectral_norm in training": (
        lambda: with_old(nn.utils.spectral_norm).train(),
        VECTORS,
        r"changes the buffers \['0.weight_u'",
    ),
    "a running average": (
        lambda: made(remember, inner=linear(), average=torch.tensor(0.5)),
        VECTORS,
        r"Made mixes samples|changes the buffers \['average'\]",
    ),
    "weights changed": (
        lambda: made(clipped, inner=linear()).double(),
        VECTORS,
        r"changes the parameters \['inner.weight'\]",
    ),
    "an embedding that rescales": (
        lambda: nn.Sequential(nn.Embedding(9, 5, max_norm=1.0)),
        TOKENS,
        r"'0' \(Embedding\) has max_norm",
    ),
    "not initialised": (
        lambda: nn.Sequential(nn.LazyLinear(3), nn.Tanh(), linear(3, 3)),
        VECTORS,
        r"'0' \(LazyLinear\) has a weight that is not initialised yet: call the module once",
    ),
    "lazy statistics": (
        lambda: nn.Sequential(linear(), nn.LazyBatchNorm1d()).eval(),
        VECTORS,
        r"'1' \(LazyBatchNorm1d\)",
    ),
    "without values": (lambda: nn.Sequential(nn.Linear(6, 3, device="meta")), VECTORS, "on the device 'meta'"),
    "complex parameters": (
        lambda: nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)),
        VECTORS,
        "'0.weight' is torch.complex64",
    ),
    "complex inputs": (linear, VECTORS + 1j, "x must be real, got torch.complex128"),
    "complex outputs": (
        lambda: made(lambda s, x: torch.fft.fft(s.inner(x)), inner=linear()),
        VECTORS,
        "Made returns torch.complex128",
    ),
    "integer outputs": (
        lambda: made(lambda s, x: s.inner(x).argmax(1), inner=linear()),
        VECTORS,
        "Made returns torch.int64",
    ),
    "compiled by torch.jit": (
        lambda: torch.jit.trace(nn.Sequential(linear(), nn.Tanh()), VECTORS.float()),
        VECTORS,
        "is compiled by torch.jit: give the module",
    ),
    "a tuple": (lambda: nn.LSTM(6, 4, batch_first=True), SEQUENCES, "LSTM returns a tuple: wrap it"),
    "a dictionary": (
        lambda: made(lambda s, x: {"z": s.inner(x)}, inner=linear()),
        VECTORS,
        "Made returns a dict: wrap it",
    ),
    "rows joined": (
        lambda: made(lambda s, x: s.inner(x).flatten(0, 1), inner=linear()),
        SEQUENCES,
        r"returns shape \(\d+, 6\) for \d samples",
    ),
    "one number for all": (
        lambda: made(lambda s, x: s.inner(x).mean(), inner=linear()),
        VECTORS,
        r"returns shape \(\) for",
    ),
    "one row for all": (
        lambda: made(lambda s, x: s.inner(x).mean(0), inner=linear(6, 2)),
        VECTORS,
        r"returns shape \(2,\) for",
    ),
    "no samples": (linear, VECTORS[:0], r"x must hold samples \(k, …\), k ≥ 1, got shape \(0, 6\)"),
    "a precision of its own": (
        lambda: made(lambda s, x: s.inner(x.half()), inner=linear()),
        VECTORS,
        "Made does not run in torch.float64: let it cast nothing",
    ),
    "tensors that are no buffers": (
        lambda: made(lambda s, x: s.inner(x) @ torch.ones(6, 2), inner=linear()),
        VECTORS,
        "Made does not run in torch.float64",
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Lazy modules", "ignore:.torch.jit")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_one_sample_is_refused_in_one_line_that_names_it(name):
    make, x, message = REFUSED[name]
    torch.manual_seed(0)
    module, state = make(), torch.get_rng_state()
    with pytest.raises(UserError, match=message) as refusal:
        EmpiricalNTK(module)(x, x)
    assert "\n" not in str(refusal.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["batch mean", "attention over the batch"])
def test_mixing_shows_also_where_the_first_samples_are_copies_or_x_has_one(name):
    make, x, message = REFUSED[name]
    copies = torch.cat([x[:1].expand(5, -1), x[3:]])
    for left, right in ((copies, copies), (x[:1], x), (x, x[:1]), (x[:1], x[1:2])):
        with pytest.raises(UserError, match=message):
            EmpiricalNTK(make())(left, right)
