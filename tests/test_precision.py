"""Casts to float64 in all measures and theory: device, data types, and rejected inputs."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64, single_threaded
from stepwise_lightning.spectrum import (
    alpha_req,
    cross_correlation_eigenvalues,
    effective_rank,
    embedding_eigenvalues,
    participation_ratio,
    rankme,
)
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.measures import measure
from stepwise_lightning.spectrum.steps import crossing_times, detect_steps, num_crossed, num_grown
from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    EmpiricalNTK,
    LinearBarlowTwins,
    feature_cross_correlation,
    laplace_kernel,
    linear_kernel,
    rbf_kernel,
    relu_ntk,
    subspace_alignment,
)


class OnApple(Tensor):
    """Tensor with the device of an Apple GPU, which raises in casts to float64 until it is moved to the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def to(self, *arguments, **options) -> Tensor:
        kinds = [getattr(a, "dtype", a) for a in (*arguments, *options.values())]
        if torch.float64 in kinds:
            self.double()
        if any(torch.device(str(getattr(a, "device", a))).type == "cpu" for a in arguments if str(a) == "cpu"):
            return self.cpu()
        return super().to(*arguments, **options)


def on_apple(z: Tensor) -> Tensor:
    return z.as_subclass(OnApple)


def draw(n: int = 12, d: int = 4, seed: int = 0) -> Tensor:
    """Return integers up to 9, which all data types represent exactly."""
    return torch.randint(-9, 10, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def pairs() -> tuple[Tensor, Tensor]:
    x1 = draw()
    return x1, x1 + draw(seed=1).sign()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def kernel_pca(x1: Tensor, x2: Tensor) -> list[Tensor]:
    model = ContrastiveKernelPCA(partial(rbf_kernel, length_scale=5.0), 2).fit(x1, x2)
    start = model.initial_singular_values(x1, x2)
    return [
        model.eigenvalues_, model.transform(x2), model.transform_at(x1, 1.0, start), model.contrastive_kernel(x1, x2),
        model.loss(x1, x2), start,
    ]  # fmt: skip


def trajectory(first: Tensor, second: Tensor) -> list[Tensor]:
    models = [LinearBarlowTwins(GAMMA, weights[:3]) for weights in (first, second)]
    return [value for m in models for value in (m.eigenvalues, m.embedding_eigenvalues(0.1), m.weights(0.1))]


def at_times(first: Tensor, second: Tensor) -> list[Tensor]:
    model = LinearBarlowTwins(GAMMA, torch.eye(4))
    return [model.singular_values(times[0] * times[0]) for times in (first, second)]


def curves(times: Tensor, values: Tensor) -> list[Tensor]:
    steps = detect_steps(times, values)
    return [
        steps.step_times,
        steps.rise_widths,
        steps.num_learned,
        crossing_times(times, (values > 20).to(values.dtype)),
    ]


GAMMA = torch.tensor([2.0, 1, 0.5, -0.1], dtype=torch.float64).diag()
TIMES, CURVES = torch.arange(1, 12).float(), torch.arange(1, 12).float()[:, None] ** torch.tensor([2.0, 1, 0])
# Functions of two real tensors that compute in float64, with two tensors of integers.
CALLS = {
    "feature_cross_correlation": (feature_cross_correlation, *pairs()),
    "ContrastiveKernelPCA": (kernel_pca, *pairs()),
    "LinearBarlowTwins": (trajectory, *pairs()),
    "LinearBarlowTwins at": (at_times, *pairs()),
    "subspace_alignment": (subspace_alignment, *pairs()),
    "linear_kernel": (linear_kernel, *pairs()),
    "rbf_kernel": (rbf_kernel, *pairs()),
    "laplace_kernel": (laplace_kernel, *pairs()),
    "relu_ntk": (relu_ntk, *pairs()),
    "cross_correlation_eigenvalues": (cross_correlation_eigenvalues, *pairs()),
    "embedding_eigenvalues": (lambda a, b: [embedding_eigenvalues(a), embedding_eigenvalues(b)], *pairs()),
    "rankme": (lambda a, b: [rankme(a), rankme(b)], *pairs()),
    "ranks": (
        lambda a, b: [f(z) for z in (a, b) for f in (effective_rank, participation_ratio, alpha_req)],
        *(z.sort().values for z in pairs()),
    ),
    "measure": (
        lambda *views: [
            torch.tensor([*s.tolist(), *m.values()]) for s, m in (measure(name, views) for name in MATRICES)
        ],
        *pairs(),
    ),
    "detect_steps": (curves, TIMES, CURVES),
    "num_grown": (lambda a, b: torch.tensor(num_grown(a, b)), draw(1)[0].abs(), 90 + draw(1)[0].abs()),
    "num_crossed": (lambda a, b: [num_crossed(a), num_crossed(b)], *pairs()),
    "EmpiricalNTK": (EmpiricalNTK(network()), *pairs()),
}
every_call = pytest.mark.parametrize(("call", "a", "b"), CALLS.values(), ids=CALLS)


def results(call, a: Tensor, b: Tensor) -> list[Tensor]:
    values = call(a, b)
    return [value.as_subclass(Tensor) for value in (values if isinstance(values, list) else [values])]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


@every_call
def test_tensors_move_to_the_cpu_before_the_cast_if_the_device_has_no_float64(call, a, b):
    assert_same(results(call, on_apple(a), on_apple(b)), results(call, a, b))


@every_call
@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
def test_results_do_not_depend_on_the_data_type_of_integers(call, a, b, kind):
    expected = results(call, a.double(), b.double())
    for left, right in ((a.to(kind), b.to(kind)), (a.to(kind), b), (a, b.to(kind)), (a.to(kind), b.double())):
        assert_same(results(call, left, right), expected)


@every_call
def test_mixed_data_types_keep_fractions_and_digits(call, a, b):
    fractions = b.double() + 1 / 3
    expected = results(call, a.double(), fractions)
    for kind in (torch.int64, torch.float32):
        assert_same(results(call, a.to(kind), fractions), expected)


@every_call
def test_complex_numbers_raise(call, a, b):
    for left, right in ((a + 0j, b + 0j), (a + 0j, b), (a, b + 0j)):
        with pytest.raises(UserError, match=r"must be real, got torch.complex64: take .real") as error:
            call(left, right)
        assert "\n" not in str(error.value)


@every_call
def test_meta_tensors_raise(call, a, b):
    for left, right in ((a.to("meta"), b), (a, b.to("meta"))):
        with pytest.raises(UserError, match="on the device 'meta'|must be on one device"):
            call(left, right)


def test_feature_matrix_is_cast_like_the_weights():
    gamma = draw(4, 4) + draw(4, 4).T
    expected = LinearBarlowTwins(gamma, draw(3, 4)).weights(0.1)
    on_cpu = LinearBarlowTwins(on_apple(gamma), on_apple(draw(3, 4))).weights(0.1).as_subclass(Tensor)
    torch.testing.assert_close(on_cpu, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="gamma must be real, got torch.complex64"):
        LinearBarlowTwins(gamma + 0j, draw(3, 4))


def test_network_on_a_device_without_float64_runs_on_the_cpu():
    module, x = network(), draw()
    expected = EmpiricalNTK(module)(x, x)
    for part in (module[0], module[2]):
        part.weight, part.bias = (nn.Parameter(on_apple(p.detach())) for p in (part.weight, part.bias))
    for dtype in (torch.float64, torch.float32):
        kernel = EmpiricalNTK(module, dtype=dtype)(on_apple(x), on_apple(x))
        torch.testing.assert_close(kernel.as_subclass(Tensor), expected, rtol=1e-5, atol=1e-5)


def test_points_keep_their_precision_after_a_fit_on_integers(tmp_path):
    x1, x2 = pairs()
    points = draw(seed=3).double() + 1 / 3
    expected = ContrastiveKernelPCA(linear_kernel, 2).fit(x1.double(), x2.double())
    for kind in (torch.int16, torch.float32):
        model = ContrastiveKernelPCA(linear_kernel, 2).fit(x1.to(kind), x2.to(kind))
        model.save(tmp_path / "model.pt")
        for one in (model, ContrastiveKernelPCA.load(tmp_path / "model.pt", linear_kernel)):
            torch.testing.assert_close(one.transform(points), expected.transform(points), rtol=1e-12, atol=1e-12)
            assert_same([one.contrastive_kernel(points, x1)], [expected.contrastive_kernel(points, x1)])


def test_integer_tokens_reach_embedding_layers_unchanged():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 4)).double()
    x1, x2 = (torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x2[:, :3] = x1[:, :3]
    model = ContrastiveKernelPCA(EmpiricalNTK(module), 2).fit(x1, x2)
    assert model.loss(x1, x2) < 1e-12


def test_kernel_that_returns_narrow_integers_raises():
    x1, x2 = (x.to(torch.int8) for x in pairs())
    with pytest.raises(UserError, match="kernel.* returned torch.int8, whose sums overflow"):
        ContrastiveKernelPCA(lambda x, y: x @ y.T, 1).fit(x1, x2)


def test_python_floats_keep_full_precision():
    assert as_float64(0.1).item() == 0.1 and as_float64([0.1, 2]).tolist() == [0.1, 2]
    assert as_float64(np.float32([0.5])).dtype == torch.float64
    model, times = LinearBarlowTwins(torch.eye(2), 1e-3 * torch.eye(2)), [0.1 * k for k in range(11)]
    exact = torch.tensor(times, dtype=torch.float64)
    assert torch.equal(model.singular_values(times), model.singular_values(exact))
    values = CURVES - 1
    steps, expected = detect_steps(times, values.tolist()), detect_steps(exact, values)
    assert expected.step_times.isfinite().any() and torch.equal(steps.num_learned, expected.num_learned)
    torch.testing.assert_close(steps.step_times, expected.step_times, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(UserError, match="t must be real, got torch.complex128"):
        model.singular_values(1j)


def test_single_threaded_restores_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), single_threaded():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
