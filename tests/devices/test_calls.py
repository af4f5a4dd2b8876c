"""Public functions of tensors on a device: the same results as on the CPU."""

import pytest
import torch
from pretend_gpu import PretendGPU
from test_precision import CALLS, pairs
from torch.nn.functional import normalize

import stepwise_lightning
from stepwise_lightning import theory
from stepwise_lightning.classifiers import knn_scores

LABELS = torch.arange(12) % 3
FURTHER_CALLS = {
    "knn_scores": (lambda a, b, n: knn_scores(a, normalize(b), n, 3, 5, 0.1), *pairs(), LABELS),
    "simclr_loss": (lambda a, b: stepwise_lightning.simclr_loss(a, b, 0.01), *pairs()),
    "barlow_twins_loss": (stepwise_lightning.barlow_twins_loss, *pairs()),
    "vicreg_loss": (stepwise_lightning.vicreg_loss, *pairs()),
    "growth_matrix": (lambda a, b: theory.growth_matrix("vicreg", a, b, 4), *pairs()),
}
ALL_CALLS = {name: call for name, call in (CALLS | FURTHER_CALLS).items() if name != "EmpiricalNTK"}  # CPU network


def results(call, inputs):
    values = call(*inputs)
    return [v.detach() for v in (values if isinstance(values, (list, tuple)) else [values])]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", ALL_CALLS)
def test_results_on_a_device_equal_those_on_the_cpu(name, kind):
    call, *inputs = ALL_CALLS[name]
    expected = results(call, inputs)
    with PretendGPU(kind) as gpu:
        values = [v.cpu() for v in results(call, [value.to(gpu.device) for value in inputs])]
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
