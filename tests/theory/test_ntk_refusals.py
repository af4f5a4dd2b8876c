"""The tangent kernel refuses networks that mix samples, are random or are not real, with one line."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from example_networks import SEQUENCES, TOKENS, VECTORS, custom, linear, with_deprecated_norm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stepwise_lightning.errors import UserError
from stepwise_lightning.theory import EmpiricalNTK


def running_average(self, x):
    with torch.no_grad():
        self.average.mul_(0.9).add_(0.1 * x.mean())
    return self.inner(x - self.average)


def functional_dropout(self, x):
    return self.inner(F.dropout(x))


def private_generator(self, x):
    return self.inner(x + torch.randn(x.shape, generator=GENERATOR).to(x))


def rescale_weights(self, x):
    with torch.no_grad():
        self.inner.weight.mul_(0.5)
    return self.inner(x)


def attention_over_the_batch(self, x):
    return self.inner(F.softmax(x @ x.T, 1) @ x)


def across(self, x):
    return self.norm(self.inner(x))


class BatchMean(nn.Module):
    """Subtract the batch mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


GENERATOR = torch.Generator().manual_seed(0)
REFUSED = {
    "batch statistics": (
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(6, track_running_stats=False)).eval(),
        VECTORS,
        r"'1' \(BatchNorm1d\) has no running statistics and mixes samples in evaluation mode too",
    ),
    "batch norm in training": (
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(6)),
        VECTORS,
        r"'1' \(BatchNorm1d\) is in training mode",
    ),
    "functional batch norm": (
        lambda: custom(lambda s, x: F.batch_norm(s.inner(x), None, None, training=True), inner=linear()),
        SEQUENCES,
        "Custom mixes samples",
    ),
    "batch mean": (
        lambda: nn.Sequential(linear(), nn.Sequential(nn.Tanh(), BatchMean())),
        VECTORS,
        r"'1.1' \(BatchMean\) mixes samples",
    ),
    "attention over the batch": (
        lambda: custom(attention_over_the_batch, inner=linear()),
        VECTORS,
        "Custom mixes samples",
    ),
    "attention with the batch second": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8).eval(),
        SEQUENCES,
        r"'self_attn' \(MultiheadAttention\) mixes samples",
    ),
    "dropout": (lambda: nn.Sequential(linear(), nn.Dropout()), VECTORS, r"'1' \(Dropout\) is in training mode"),
    "functional dropout": (
        lambda: nn.Sequential(custom(functional_dropout, inner=linear()), nn.Tanh()),
        VECTORS,
        r"'0' \(Custom\) draws random numbers",
    ),
    "random leaky relu": (lambda: nn.Sequential(linear(), nn.RReLU()), VECTORS, r"'1' \(RReLU\) draws random numbers"),
    "dropout in a recurrent layer": (
        lambda: custom(lambda s, x: s.a(x)[0], a=nn.LSTM(6, 4, 2, dropout=0.5)),
        SEQUENCES,
        r"'a' \(LSTM\) draws random numbers",
    ),
    "private generator": (
        lambda: custom(private_generator, inner=linear()),
        VECTORS,
        "Custom draws random numbers",
    ),
    "spectral_norm in training": (
        lambda: nn.Sequential(parametrizations.spectral_norm(linear())),
        VECTORS,
        r"outputs depend on buffers that each call changes, \['0.parametrizations.weight.0._u'",
    ),
    "deprecated spectral_norm in training": (
        lambda: with_deprecated_norm(nn.utils.spectral_norm).train(),
        VECTORS,
        r"outputs depend on buffers that each call changes, \['0.weight_u'",
    ),
    "a running average": (
        lambda: custom(running_average, inner=linear(), average=torch.tensor(0.5)),
        VECTORS,
        r"outputs depend on buffers that each call changes, \['average'\]",
    ),
    "forward changes weights": (
        lambda: custom(rescale_weights, inner=linear()).double(),
        VECTORS,
        r"changes the parameters \['inner.weight'\]",
    ),
    "embedding with max_norm": (
        lambda: nn.Sequential(nn.Embedding(9, 5, max_norm=1.0)),
        TOKENS,
        r"'0' \(Embedding\) has max_norm",
    ),
    "not initialised": (
        lambda: nn.Sequential(nn.LazyLinear(3), nn.Tanh(), linear(3, 3)),
        VECTORS,
        r"'0' \(LazyLinear\) has an uninitialised weight: call the module on a batch",
    ),
    "lazy statistics": (
        lambda: nn.Sequential(linear(), nn.LazyBatchNorm1d()).eval(),
        VECTORS,
        r"'1' \(LazyBatchNorm1d\)",
    ),
    "meta device": (lambda: nn.Sequential(nn.Linear(6, 3, device="meta")), VECTORS, "on the device 'meta'"),
    "complex parameters": (
        lambda: nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)),
        VECTORS,
        "'0.weight' is torch.complex64",
    ),
    "complex inputs": (linear, VECTORS + 1j, "x must be real, got torch.complex128"),
    "complex outputs": (
        lambda: custom(lambda s, x: torch.fft.fft(s.inner(x)), inner=linear()),
        VECTORS,
        "Custom returns torch.complex128",
    ),
    "integer outputs": (
        lambda: custom(lambda s, x: s.inner(x).argmax(1), inner=linear()),
        VECTORS,
        "Custom returns torch.int64",
    ),
    "torch.jit": (
        lambda: torch.jit.trace(nn.Sequential(linear(), nn.Tanh()), VECTORS.float()),
        VECTORS,
        "is compiled by torch.jit: pass the original module",
    ),
    "a tuple": (lambda: nn.LSTM(6, 4, batch_first=True), SEQUENCES, "LSTM returns tuple for 3 samples: wrap it"),
    "a dictionary": (
        lambda: custom(lambda s, x: {"z": s.inner(x)}, inner=linear()),
        VECTORS,
        "Custom returns dict for 3 samples: wrap it",
    ),
    "rows joined": (
        lambda: custom(lambda s, x: s.inner(x).flatten(0, 1), inner=linear()),
        SEQUENCES,
        r"returns torch.float64 of shape \(\d+, 6\) for \d samples",
    ),
    "one number for all": (
        lambda: custom(lambda s, x: s.inner(x).mean(), inner=linear()),
        VECTORS,
        r"of shape \(\) for",
    ),
    "one row for all": (
        lambda: custom(lambda s, x: s.inner(x).mean(0), inner=linear(6, 2)),
        VECTORS,
        r"of shape \(2,\) for",
    ),
    "no samples": (linear, VECTORS[:0], r"x must contain at least one sample, shape \(k, …\), got shape \(0, 6\)"),
    "cast in forward": (
        lambda: custom(lambda s, x: s.inner(x.half()), inner=linear()),
        VECTORS,
        "Custom does not run in torch.float64: remove its casts",
    ),
    "unregistered tensor": (
        lambda: custom(lambda s, x: s.inner(x) @ torch.ones(6, 2), inner=linear()),
        VECTORS,
        "Custom does not run in torch.float64",
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Lazy modules", "ignore:.torch.jit")
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_network_raises_one_line_that_names_the_layer(name):
    make, x, message = REFUSED[name]
    torch.manual_seed(0)
    module, state = make(), torch.get_rng_state()
    with pytest.raises(UserError, match=message) as error:
        EmpiricalNTK(module)(x, x)
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["batch mean", "attention over the batch"])
def test_mixing_is_detected_with_identical_first_samples_or_one_sample(name):
    make, x, message = REFUSED[name]
    repeated = torch.cat([x[:1].expand(5, -1), x[3:]])
    for left, right in ((repeated, repeated), (x[:1], x), (x, x[:1]), (x[:1], x[1:2])):
        with pytest.raises(UserError, match=message):
            EmpiricalNTK(make())(left, right)
