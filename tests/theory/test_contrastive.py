"""Contrastive kernel PCA against the paper's formula, the linear model and gradient flow."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    EmpiricalNTK,
    LinearBarlowTwins,
    block_lanczos,
    feature_cross_correlation,
    laplace_kernel,
    linear_kernel,
    rbf_kernel,
    relu_ntk,
)

RBF = partial(rbf_kernel, length_scale=2.0)
KERNELS = {"linear": linear_kernel, "rbf": RBF, "laplace": partial(laplace_kernel, length_scale=3.0), "ntk": relu_ntk}


def pairs(n: int = 30, m: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(n, m, dtype=torch.float64, generator=generator) * torch.linspace(2, 0.5, m)
    return tuple(content + 0.3 * torch.randn(n, m, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.fixture(params=["dense", "lanczos", "streamed"])
def route(request, monkeypatch) -> dict:
    """Return options that select the dense eigendecomposition, Lanczos, or Lanczos with recomputed tiles."""
    if request.param != "dense":
        monkeypatch.setattr(block_lanczos, "_DENSE", 0)
    return {"max_bytes": 8 * 6 * 60 * 7} if request.param == "streamed" else {}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_embedding_matches_formula_of_the_paper(kernel, route):
    """f(x) = Λ^{−1/2} Vᵀ K̃^{−1/2} [K(X, x); K(X', x)], V the top eigenvectors of (1/2n) K̃^{1/2} P K̃^{1/2}."""
    x1, x2 = pairs()
    model = ContrastiveKernelPCA(kernel, 4, **route).fit(x1, x2)
    z = torch.cat([x1, x2])
    weights, basis = torch.linalg.eigh(kernel(z, z))
    kept = weights > 1e-11 * weights[-1]
    root, inverse = (basis[:, kept] * weights[kept] ** power @ basis[:, kept].T for power in (0.5, -0.5))
    gamma, vectors = torch.linalg.eigh(root @ root.roll(30, 0) / 60)
    gamma, vectors = gamma.flip(0)[:4], vectors.flip(1)[:, :4]
    torch.testing.assert_close(model.eigenvalues_, gamma, rtol=1e-10, atol=0)
    points = pairs(seed=1)[0]
    expected = kernel(points, z) @ inverse @ vectors / gamma.sqrt()
    embeddings = model.transform(points)
    torch.testing.assert_close(embeddings * (embeddings * expected).sum(0).sign(), expected, rtol=1e-5, atol=1e-6)


def test_coefficients_are_orthonormal_eigenvectors(route):
    x1, x2 = pairs()
    model = ContrastiveKernelPCA(RBF, 5, **route).fit(x1, x2)
    z = torch.cat([x1, x2])
    k, beta = RBF(z, z), model.coefficients_
    torch.testing.assert_close(beta.T @ k @ beta, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close((k @ beta).roll(30, 0) / 60, beta * model.eigenvalues_, rtol=1e-7, atol=1e-8)
    values = k @ beta
    assert (values.gather(0, values.abs().argmax(0, keepdim=True)) > 0).all()
    f1, f2 = model.fit_transform(x1, x2)
    c = (f1.T @ f2 + f2.T @ f1) / 60
    torch.testing.assert_close(c, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-8)
    assert model.loss(x1, x2) < 1e-15 < 0.01 < model.loss(*pairs(seed=1))


def test_linear_kernel_matches_linear_model(route):
    x1, x2 = pairs()
    start = torch.tensor([1e-3, 2e-3, 1e-3], dtype=torch.float64)
    model = ContrastiveKernelPCA(linear_kernel, 3, **route).fit(x1, x2)
    gamma = feature_cross_correlation(x1, x2)
    eigenvectors = torch.linalg.eigh(gamma).eigenvectors.flip(1)[:, :3]
    linear = LinearBarlowTwins(gamma, torch.diag(start) @ eigenvectors.T)
    torch.testing.assert_close(model.eigenvalues_, linear.eigenvalues, rtol=1e-11, atol=0)
    torch.testing.assert_close(model.step_times(start), linear.step_times, rtol=1e-9, atol=0)
    t = torch.linspace(0, 2 * float(linear.step_times.max()), 5)
    expected = x1 @ linear.weights(t).mT @ linear.rotation
    embeddings = model.transform_at(x1, t, start)
    signs = (embeddings[-1] * expected[-1]).sum(0).sign()
    torch.testing.assert_close(embeddings * signs, expected, rtol=1e-6, atol=1e-8)


def test_initial_singular_values_match_linear_model(route):
    x1, x2 = pairs()
    weights = 1e-4 * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    linear = LinearBarlowTwins(feature_cross_correlation(x1, x2), weights)
    model = ContrastiveKernelPCA(linear_kernel, 5, **route).fit(x1, x2)
    start = model.initial_singular_values(x1 @ weights.T, x2 @ weights.T)
    torch.testing.assert_close(start, linear.initial_singular_values, rtol=1e-8, atol=0)
    torch.testing.assert_close(model.step_times(start), linear.step_times, rtol=1e-8, atol=0)
    t = torch.linspace(0, 2 * float(linear.step_times.max()), 7)
    aligned = model.embedding_eigenvalues(t, start)
    expected = linear.embedding_eigenvalues(t, method="qr").sort(dim=1, descending=True).values
    torch.testing.assert_close(aligned, expected, rtol=1e-6, atol=1e-10)
    with pytest.raises(ValueError, match=r"shape \(30, at least 5\) for each view, got \(30, 4\) and \(30, 4\)"):
        model.initial_singular_values(x1[:, :4], x2[:, :4])


def test_trajectory_matches_gradient_flow():
    """dA/dt = −4 (C − I) A K̃ P / 2n for f(x) = A [K(z_i, x)], integrated by Runge-Kutta from an aligned small start."""
    x1, x2 = pairs(12)
    model = ContrastiveKernelPCA(RBF, 3).fit(x1, x2)
    start = torch.tensor([2e-2, 1e-2, 3e-2], dtype=torch.float64)
    k = RBF(*[torch.cat([x1, x2])] * 2)

    def flow(a: Tensor) -> Tensor:
        f = a @ k
        c = f @ f.roll(12, 1).T / 24
        return -4 * (c - torch.eye(3)) @ f.roll(12, 1) / 24

    a, step = (model.coefficients_ * start).T, 0.02
    end = round(1.2 * float(model.step_times(start).max()) / step)
    for _ in range(end):
        first = flow(a)
        second = flow(a + step / 2 * first)
        third = flow(a + step / 2 * second)
        a = a + step / 6 * (first + 2 * second + 2 * third + flow(a + step * third))
    points = pairs(5, seed=2)[0]
    embeddings = model.transform_at(points, end * step, start)
    torch.testing.assert_close(embeddings, RBF(points, torch.cat([x1, x2])) @ a.T, rtol=1e-5, atol=1e-6)
    forever = model.transform_at(points, torch.tensor([0.0, 1e9]), start)
    torch.testing.assert_close(forever[1], model.transform(points), rtol=1e-9, atol=1e-12)
    assert forever.shape == (2, 5, 3) and embeddings.shape == (5, 3)


def test_contrastive_kernel_has_the_fitted_eigenfunctions():
    """k_Γ(x, y) = Σ_j γ_j φ_j(x) φ_j(y), φ_j of unit norm, over all modes, including negative ones."""
    x1, x2 = pairs(8, 3)
    model = ContrastiveKernelPCA(linear_kernel, 3).fit(x1, x2)
    x, y = pairs(4, 3, seed=1)
    expected = x @ feature_cross_correlation(x1, x2) @ y.T
    torch.testing.assert_close(model.contrastive_kernel(x, y), expected, rtol=1e-10, atol=1e-12)
    functions = [model.transform(points) * model.eigenvalues_ for points in (x, y)]
    torch.testing.assert_close(functions[0] @ functions[1].T, expected, rtol=1e-8, atol=1e-9)


def test_eigenvalues_are_shared_content_minus_noise():
    x1, x2 = pairs()
    mean, half = (x1 + x2) / 2, (x1 - x2) / 2
    expected = torch.linalg.eigvalsh((mean.T @ mean - half.T @ half) / 30).flip(0)[:4]
    torch.testing.assert_close(ContrastiveKernelPCA(linear_kernel, 4).fit(x1, x2).eigenvalues_, expected)


def test_repeated_pairs_do_not_change_the_fit(route):
    x1, x2 = pairs()
    x1, x2 = (torch.cat([x[:15], x[:15]]) for x in (x1, x2))
    x2[:5] = x1[:5]
    once = ContrastiveKernelPCA(RBF, 4).fit(x1[:20], x2[:20])
    twice = ContrastiveKernelPCA(RBF, 4, **route).fit(torch.cat([x1[:20]] * 2), torch.cat([x2[:20]] * 2))
    torch.testing.assert_close(once.eigenvalues_, twice.eigenvalues_, rtol=1e-10, atol=0)
    torch.testing.assert_close(once.transform(x1), twice.transform(x1), rtol=1e-6, atol=1e-8)


def test_dense_and_iterative_fits_agree_on_larger_problem(monkeypatch):
    x1, x2 = pairs(400, 20)
    lanczos = ContrastiveKernelPCA(RBF, 6).fit(x1, x2)
    streamed = ContrastiveKernelPCA(RBF, 6, max_bytes=10**6).fit(x1, x2)
    monkeypatch.setattr(block_lanczos, "_DENSE", 400)
    dense = ContrastiveKernelPCA(RBF, 6).fit(x1, x2)
    for model in (lanczos, streamed):
        torch.testing.assert_close(model.eigenvalues_, dense.eigenvalues_, rtol=1e-11, atol=0)
        torch.testing.assert_close(model.transform(x1), dense.transform(x1), rtol=1e-4, atol=1e-6)
        assert 0 < model.residuals_.max() <= 1e-7 * model.eigenvalues_[0]


def test_single_pair_and_float32_images():
    x1, x2 = pairs(1)
    model = ContrastiveKernelPCA(linear_kernel, 1).fit(x1, x2)
    gamma = (x1 @ x2.T + x1.norm() * x2.norm()).item() / 2  # of (x x'ᵀ + x' xᵀ)/2
    assert model.eigenvalues_.item() == pytest.approx(gamma)
    x1, x2 = (x.float().view(30, 1, 2, 3) for x in pairs())
    model = ContrastiveKernelPCA(RBF, 2).fit(x1, x2)
    same = ContrastiveKernelPCA(RBF, 2).fit(x1.double().flatten(1), x2.double().flatten(1))
    assert model.transform(x1).dtype == torch.float64
    torch.testing.assert_close(model.eigenvalues_, same.eigenvalues_, rtol=1e-12, atol=0)


def test_load_restores_saved_model(tmp_path):
    x1, x2 = pairs()
    model = ContrastiveKernelPCA(RBF, 3).fit(x1, x2)
    model.save(tmp_path / "model.pt")
    loaded = ContrastiveKernelPCA.load(tmp_path / "model.pt", RBF)
    assert torch.equal(loaded.transform(x1), model.transform(x1)) and loaded.n_components == 3
    torch.load(tmp_path / "model.pt", weights_only=True)


def skewed(x: Tensor, y: Tensor) -> Tensor:
    return linear_kernel(x, 1 + y)


BAD = {
    "shapes": (lambda a, b: (a, b[:, :3]), RBF, {}, r"the same shape, got \(30, 6\) and \(30, 3\)"),
    "lengths": (lambda a, b: (a[:9], b), RBF, {}, r"the same shape, got \(9, 6\) and \(30, 6\)"),
    "empty": (lambda a, b: (a[:0], b[:0]), RBF, {}, "not be empty"),
    "nan": (lambda a, b: (a, b / 0), RBF, {}, "the second views contain NaN or infinite values"),
    "wrong shape": (lambda a, b: (a, b), lambda x, y: linear_kernel(x, y)[0], {}, r"must return a real \(k, l\)"),
    "complex": (lambda a, b: (a, b), lambda x, y: linear_kernel(x, y) * 1j, {}, "must return a real .*complex128"),
    "asymmetric": (lambda a, b: (a, b), skewed, {}, "must be symmetric, got an asymmetric matrix"),
    "kernel nan": (lambda a, b: (a, b), lambda x, y: linear_kernel(x, y).log(), {}, "NaN or infinite values"),
    "too many": (lambda a, b: (a, b), linear_kernel, {"n_components": 7}, "must be 1 to 6, .* got 7"),
    "none": (lambda a, b: (a, -a), linear_kernel, {}, "no positive mode"),
    "zeros": (lambda a, b: (0 * a, 0 * b), relu_ntk, {}, "no positive value: check that the views are not all zero"),
    "a string": (lambda a, b: (a, b), lambda x, y: "k", {}, r"result of kernel\(x, y\) must be a tensor, an"),
    "no room": (lambda a, b: (a, b), RBF, {"max_bytes": 100}, "at least 12288 for one tile of kernel values, got 100"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kernel", "options", "message"), BAD.values(), ids=BAD)
def test_invalid_input_raises_one_line(change, kernel, options, message):
    with pytest.raises(ValueError, match=message) as error:
        ContrastiveKernelPCA(kernel, **({"n_components": 2} | options)).fit(*change(*pairs()))
    assert "\n" not in str(error.value)


def test_iteration_counts_positive_modes(monkeypatch):
    monkeypatch.setattr(block_lanczos, "_DENSE", 0)
    with pytest.raises(ValueError, match="must be 1 to 6, the number of positive modes .*, got 7"):
        ContrastiveKernelPCA(linear_kernel, 7).fit(*pairs())


def test_kernel_of_zeros_is_refused_by_every_route(route):
    dead = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    nn.init.constant_(dead[0].bias, -1e3)
    for kernel in (linear_kernel, EmpiricalNTK(dead)):
        views = [0 * x if kernel is linear_kernel else x for x in pairs()]
        with pytest.raises(ValueError, match="kernel of these pairs has no positive value"):
            ContrastiveKernelPCA(kernel, 2, **route).fit(*views)


def test_a_name_is_refused_as_kernel_and_existing_kernels_are_listed():
    model = ContrastiveKernelPCA(RBF, 2)
    for use in (lambda: ContrastiveKernelPCA("rbf", 2), lambda: model.set_params(kernel="laplace")):
        with pytest.raises(ValueError, match="got '(rbf|laplace)': use linear_kernel, rbf_kernel, .*EmpiricalNTK"):
            use()


def test_arrays_lists_and_kernels_that_return_arrays_equal_tensors():
    (x1, x2), start = pairs(), np.full(2, 1e-3)
    expected = ContrastiveKernelPCA(RBF, 2).fit(x1, x2)
    returns_arrays = ContrastiveKernelPCA(lambda x, y: RBF(x, y).numpy(), 2)
    for model in (ContrastiveKernelPCA(RBF, 2), returns_arrays):
        for convert in (Tensor.numpy, Tensor.tolist):
            a1, a2 = convert(x1), convert(x2)
            model.fit(a1, a2)
            assert torch.equal(model.coefficients_, expected.coefficients_)
            assert torch.equal(model.transform(a1), expected.transform(x1))
            assert torch.equal(model.loss(a1, a2), expected.loss(x1, x2))
            assert torch.equal(model.contrastive_kernel(a1, a2), expected.contrastive_kernel(x1, x2))
            assert torch.equal(model.initial_singular_values(a1, a2), expected.initial_singular_values(x1, x2))
            at = model.transform_at(a1, np.array([1.0, 2.0]), start)
            assert torch.equal(at, expected.transform_at(x1, torch.tensor([1.0, 2.0]), torch.tensor(start)))


def test_invalid_arguments_raise():
    for wrong in ({"n_components": 0}, {"n_components": 2, "tolerance": 0}):
        with pytest.raises(ValueError, match="n_components must be at least 1|tolerance must lie between"):
            ContrastiveKernelPCA(RBF, **wrong)
    model, (x1, x2) = ContrastiveKernelPCA(RBF, 2), pairs()
    for use in (lambda: model.transform(x1), lambda: model.step_times(torch.ones(2)), lambda: model.save("x")):
        with pytest.raises(ValueError, match=r"is not fitted: call fit\(x1, x2\) first"):
            use()
    model.fit(x1, x2)
    with pytest.raises(ValueError, match="must be 2 values ≥ 0"):
        model.transform_at(x1, 1.0, torch.ones(3))
    with pytest.raises(ValueError, match="t must be ≥ 0"):
        model.transform_at(x1, -1.0, torch.ones(2))


@pytest.mark.parametrize("kernel", ["rbf", None, torch.nn.Linear(6, 2)])
def test_object_that_is_no_kernel_is_refused(kernel):
    with pytest.raises(ValueError, match="kernel must be a function kernel.* use linear_kernel, .* EmpiricalNTK"):
        ContrastiveKernelPCA(kernel, 2)
