"""Mutation tests: change one thing in an experiment or theory, and check that the named claim fails.

The figures run with the smoke profile, with which all claims hold. A mutation is a function that patches this process,
and a line in ``MUTATIONS``.
"""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reproduce import kernel_machines, linear_models, mode_rates, wide_networks
from reproduce.__main__ import main
from reproduce.figures import any_loss, kernel_mlp, kernel_pca, linear_model, start_scale
from stepwise_lightning import BarlowTwins, FixedCropPairs, losses
from stepwise_lightning.callbacks.clock import Clock
from stepwise_lightning.encoders import LinearEncoder
from stepwise_lightning.spectrum import measures, record, steps
from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    LinearBarlowTwins,
    feature_cross_correlation,
    kernels,
    linear,
    moments,
)


def change_source(patch, module, name, old, new):
    """Replace one expression in a function of a module."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1, f"{old!r} is not in the source of {name}"
    namespace = dict(vars(module))
    exec(compile(source.replace(old, new), module.__file__, "exec"), namespace)
    patch.setattr(module, name, namespace[name])


# ---- training ----


def unsymmetrised(patch):
    """Omit the transpose of C in the loss."""
    change_source(patch, losses, "barlow_twins_terms", "(c + c.T) / (2 * len(z1))", "c / len(z1)")


def without_half(patch):
    """Divide C in the loss by n instead of 2n."""
    change_source(patch, losses, "barlow_twins_terms", "(c + c.T) / (2 * len(z1))", "(c + c.T) / len(z1)")


def lighter_off_diagonal(patch):
    """Weight the off-diagonal term with 0.9."""
    change_source(patch, losses, "barlow_twins_terms", "off_diagonal_weight * _off", "0.9 * off_diagonal_weight * _off")


def adam(patch):
    """Train with Adam."""

    def configure(module):
        return torch.optim.Adam(module.parameters(), lr=module.hparams["learning_rate"])

    patch.setattr(BarlowTwins, "configure_optimizers", configure)


def momentum(patch):
    """Train with momentum that the theory ignores."""

    def configure(module):
        return torch.optim.SGD(module.parameters(), lr=module.hparams["learning_rate"], momentum=0.5)

    patch.setattr(BarlowTwins, "configure_optimizers", configure)


def ordinary_as_small(patch):
    """Use ordinary instead of small initialisation."""

    def encoder(in_features, out_features, init_std=None, seed=0):
        return LinearEncoder(in_features, out_features, None, seed)

    for figure in (linear_model, start_scale):
        patch.setattr(figure, "LinearEncoder", encoder)


def wrong_pairs(patch):
    """Train on the first view of one image and the second of another."""
    batches = FixedCropPairs.train_dataloader

    def train_dataloader(pairs):
        repeated = batches(pairs)
        repeated.batch = (repeated.batch[0], repeated.batch[1].roll(1, 0))
        return repeated

    patch.setattr(FixedCropPairs, "train_dataloader", train_dataloader)


def noise_images(patch):
    """Train on independent noise in each view."""
    setup = FixedCropPairs.setup

    def setup_with_noise(pairs, stage=None):
        setup(pairs, stage)
        generator = torch.Generator().manual_seed(0)
        pairs.x1, pairs.x2 = (torch.randn(x.shape, generator=generator) for x in (pairs.x1, pairs.x2))

    patch.setattr(FixedCropPairs, "setup", setup_with_noise)


def machine_without_pairs(patch):
    """Train a kernel machine with P = I."""
    change_source(patch, kernel_machines, "next_step", "f.roll(n, 1)", "f")


def machine_of_wrong_pairs(patch):
    """Train a kernel machine on wrong pairs."""
    change_source(patch, kernel_machines, "next_step", "f.roll(n, 1)", "f.roll(n + 1, 1)")


# ---- theory ----


def half_rate(patch):
    """Use a growth rate of 4γ instead of 8γ in the theory."""
    growth = LinearBarlowTwins._log_growth
    patch.setattr(LinearBarlowTwins, "_log_growth", lambda *arguments: growth(*arguments) / 2)


def doubled_exponent(patch):
    """Double the exponent of s_j(t)."""
    flow = LinearBarlowTwins._flow_singular_values
    patch.setattr(LinearBarlowTwins, "_flow_singular_values", lambda theory, times: flow(theory, 2 * times))


def wrong_recursion(patch):
    """Use s ← s + 4ηγ s (1 − γ²s⁴) as the recursion of finite steps."""
    change_source(patch, linear, "_recursion", "s += rate * s * (1 - x)", "s += rate * s * (1 - x * x)")


def transform_with_gamma(patch):
    """Scale the final embedding of contrastive kernel PCA by γ instead of γ^−½."""
    patch.setattr(ContrastiveKernelPCA, "transform", lambda pca, x: pca._eigenfunctions(x) * pca.eigenvalues_)


def squared_course(patch):
    """Square the embedding of contrastive kernel PCA during training."""
    course = ContrastiveKernelPCA.transform_at
    patch.setattr(ContrastiveKernelPCA, "transform_at", lambda *arguments: course(*arguments) ** 2)


def contrastive_kernel_of_one_view(patch):
    """Compute the contrastive kernel of points with the first views only."""

    def contrastive_kernel(pca, x, y):
        left, right = (pca.kernel(points, pca._views)[:, : len(pca._views) // 2] for points in (x, y))
        return left @ right.T / left.shape[1]

    patch.setattr(ContrastiveKernelPCA, "contrastive_kernel", contrastive_kernel)


def norm_without_root(patch):
    """Omit the root in the smallest norm of a global minimum."""
    minimum_norm = moments.minimum_norm
    for module in (linear_models, kernel_machines):
        patch.setattr(module, "minimum_norm", lambda gamma: minimum_norm(gamma) ** 2)


def one_view(patch):
    """Compute Γ from the first views only."""
    for figure in (linear_model, start_scale):
        patch.setattr(figure, "feature_cross_correlation", lambda x1, x2: feature_cross_correlation(x1, x1))


def kernel_of_one_view(patch):
    """Compute the contrastive kernel from the first views only."""
    fit = ContrastiveKernelPCA.fit
    patch.setattr(ContrastiveKernelPCA, "fit", lambda self, x1, x2, **options: fit(self, x1, x1.clone(), **options))


def theory_without_pairs(patch):
    """Set P = I in contrastive kernel PCA."""

    def fit(self, x1, x2):
        self._views = torch.cat([x1, x2])
        k = self.kernel(self._views, self._views)
        values, vectors = torch.linalg.eigh((k + k.T).double() / 2)
        values, vectors = (part.flip(-1)[..., : self.n_components] for part in (values, vectors))
        self.eigenvalues_, self.coefficients_ = values / len(k), vectors / values.sqrt()
        return self

    patch.setattr(ContrastiveKernelPCA, "fit", fit)


def signature_of_vicreg(patch):
    """Use the signature of VICReg in the theory of every loss."""
    modes, vicreg = mode_rates.growth_modes, mode_rates.LOSSES["VICReg"].function
    patch.setattr(mode_rates, "growth_modes", lambda loss, *arguments: modes(vicreg, *arguments))


def _trained_with_variant(patch, name):
    loss = mode_rates.LOSSES[name]
    patch.setitem(mode_rates.LOSSES, name, loss._replace(function=mode_rates.VARIANTS[name].function))


def self_similarity(patch):
    """Train SimCLR with the similarity of each view with itself in the denominator."""
    _trained_with_variant(patch, "SimCLR")


def squared_hinge(patch):
    """Train VICReg with squared hinges."""
    _trained_with_variant(patch, "VICReg")


def without_finite_steps(patch):
    """Omit the learning rate in the theory."""
    for figure in (linear_model, kernel_pca, start_scale):
        patch.setattr(figure, "LinearBarlowTwins", lambda gamma, start, **_: LinearBarlowTwins(gamma, start))


def centred_kernel(patch):
    """Centre the kernel of the closed form, but not of the trained machine."""
    fit = ContrastiveKernelPCA.fit

    def fit_centred(self, x1, x2, **options):
        kernel, views = self.kernel, torch.cat([x1, x2])
        columns = kernel(views, views).mean(0)

        def centred(x, y):
            rows, others = kernel(x, views).mean(1, keepdim=True), kernel(views, y).mean(0)
            return kernel(x, y) - rows - others + columns.mean()

        self.kernel = centred
        return fit(self, x1, x2, **options)

    patch.setattr(ContrastiveKernelPCA, "fit", fit_centred)


def kernel_after_as_before(patch):
    """Use the tangent kernel at initialisation as the kernel after training."""
    initial, tangent_kernels = {}, kernel_mlp.tangent_kernels

    def scaled_initial_kernels(network, z):  # a relative change of 0 has no place on the figure's logarithmic axis
        if network not in initial:
            initial[network] = tangent_kernels(network, z)
            return initial[network]
        return {name: 1.001 * k for name, k in initial[network].items()}

    patch.setattr(kernel_mlp, "tangent_kernels", scaled_initial_kernels)


def last_layer_kernel(patch):
    """Use the kernel of the last layer as the tangent kernel."""
    patch.setitem(wide_networks.KERNELS, "full", "last")


def frozen_hidden_layer(patch):
    """Train the last layer only."""
    patch.setitem(kernel_mlp.VARIANTS, "lazy", replace(kernel_mlp.VARIANTS["lazy"], trained="last"))


def nngp_kernel(patch):
    """Use the kernel of the last layer (NNGP) as the tangent kernel of infinite width."""
    change_source(patch, kernels, "relu_ntk", "1 - complement + tangent * kappa0", "1 - complement")
    patch.setattr(kernel_mlp, "relu_ntk", kernels.relu_ntk)


def column_norms(patch):
    """Use column norms instead of the QR decomposition of the start."""
    patch.setattr(
        ContrastiveKernelPCA,
        "initial_singular_values",
        lambda self, f1, f2: (torch.cat([f1, f2]).T @ self.coefficients_).norm(dim=0),
    )


def half_target(patch):
    """Let the kernel machine converge to C = I/2."""
    change_source(patch, wide_networks, "kernel_machine", "torch.eye(f.shape[1])", "0.5 * torch.eye(f.shape[1])")
    patch.setattr(kernel_mlp, "kernel_machine", wide_networks.kernel_machine)


# ---- measurement ----


def time_without_rate(patch):
    """Omit the learning rate in the effective time."""
    patch.setattr(Clock, "time", property(lambda clock: float(clock.steps)))


def rates_of_gradient_flow(patch):
    """Omit the finite step in the measured growth rates."""
    change_source(patch, mode_rates, "measured_rates", "slopes.expm1() / rate", "slopes / rate")
    patch.setattr(any_loss, "measured_rates", mode_rates.measured_rates)


def float32_spectra(patch):
    """Compute C in float32 for the measured spectra."""
    change_source(
        patch, measures, "cross_correlation_eigenvalues", "c = x1.T @ x2 / n", "c = x1.float().T @ x2.float() / n"
    )


def lower_threshold(patch):
    """Lower the step threshold to a hundredth of the largest eigenvalue."""
    change_source(patch, steps, "detect_steps", "0.1 * tail", "0.01 * tail")
    patch.setattr(record, "detect_steps", steps.detect_steps)


# (figure, mutation, claim that must fail). reproduce/README.md contains the same table.
MUTATIONS = [
    ("linear_model", unsymmetrised, "objective"),
    ("linear_model", without_half, "objective"),
    ("linear_model", lighter_off_diagonal, "objective"),
    ("linear_model", adam, "crossed"),
    ("linear_model", momentum, "crossed"),
    ("linear_model", ordinary_as_small, "distinct"),
    ("linear_model", wrong_pairs, "crossed"),
    ("linear_model", noise_images, "distinct"),
    ("linear_model", half_rate, "crossed"),
    ("linear_model", one_view, "crossed"),
    ("linear_model", doubled_exponent, "aligned"),
    ("linear_model", wrong_recursion, "recursion"),
    ("linear_model", ordinary_as_small, "norm"),
    ("linear_model", norm_without_root, "norm"),
    ("linear_model", without_finite_steps, "deviation"),
    ("linear_model", time_without_rate, "crossed"),
    ("linear_model", float32_spectra, "log_deviation"),
    ("linear_model", lower_threshold, "detected"),
    ("start_scale", ordinary_as_small, "linear_plateaus"),
    ("start_scale", half_rate, "linear_deviation"),
    ("start_scale", without_finite_steps, "linear_deviation"),
    ("kernel_pca", machine_without_pairs, "relu_held_out"),
    ("kernel_pca", machine_of_wrong_pairs, "rbf_held_out"),
    ("kernel_pca", theory_without_pairs, "relu_held_out"),
    ("kernel_pca", kernel_of_one_view, "relu_held_out"),
    ("kernel_pca", centred_kernel, "rbf_held_out"),
    ("kernel_pca", doubled_exponent, "rbf_values"),
    ("kernel_pca", transform_with_gamma, "relu_values"),
    ("kernel_pca", squared_course, "rbf_values"),
    ("kernel_pca", contrastive_kernel_of_one_view, "relu_eigenfunctions"),
    ("kernel_pca", norm_without_root, "rbf_norm"),
    ("kernel_pca", half_rate, "rbf_step_times"),
    ("kernel_pca", without_finite_steps, "relu_step_times"),
    ("kernel_mlp", wrong_pairs, "embedding"),
    ("kernel_mlp", frozen_hidden_layer, "embedding"),
    ("kernel_mlp", last_layer_kernel, "embedding"),
    ("kernel_mlp", half_target, "scale"),
    ("kernel_mlp", theory_without_pairs, "final"),
    ("kernel_mlp", kernel_of_one_view, "step_times"),
    ("kernel_mlp", column_norms, "step_times"),
    ("kernel_mlp", half_rate, "step_times"),
    ("kernel_mlp", time_without_rate, "step_times"),
    ("kernel_mlp", nngp_kernel, "infinite_width"),
    ("kernel_mlp", kernel_after_as_before, "moved"),
    ("any_loss", signature_of_vicreg, "linear_order"),
    ("any_loss", wrong_pairs, "linear_median"),
    ("any_loss", rates_of_gradient_flow, "linear_rates"),
    ("any_loss", self_similarity, "linear_closed_form"),
    ("any_loss", squared_hinge, "wide_closed_form"),
]
MODULES = {module.FIGURE.name: module for module in (linear_model, start_scale, kernel_pca, kernel_mlp, any_loss)}
SMALLER = {"linear_model": ["--dim", "2"]}


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "mutate", "claim"), MUTATIONS, ids=lambda part: getattr(part, "__name__", part))
def test_mutation_fails_the_claim(figure, mutate, claim, tmp_path, monkeypatch):
    assert claim in failing_claims(figure, tmp_path, mutate, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("figure", MODULES)
def test_all_claims_hold_without_mutation(figure, tmp_path, monkeypatch):
    assert failing_claims(figure, tmp_path, lambda patch: None, monkeypatch) == set()


def test_readme_lists_the_mutations():
    text = (Path(__file__).parents[2] / "reproduce" / "README.md").read_text(encoding="utf-8")
    rows = [f"| {mutate.__doc__} | `{figure}` | `{claim}` |" for figure, mutate, claim in MUTATIONS]
    start = text.index("| mutation | figure |")
    assert text[start:].split("\n\n")[0].splitlines()[2:] == rows


def failing_claims(figure, folder, mutate, patch):
    """Run a mutated figure with the smoke profile; return the names of the claims that fail."""
    # Patches apply to this process only.
    patch.setattr(MODULES[figure], "map_parallel", lambda function, items, title: [function(*item) for item in items])
    mutate(patch)
    # The error of float32 appears in late modes, which two dimensions do not have.
    smaller = [] if mutate is float32_spectra else SMALLER.get(figure, [])
    main([figure, "--profile", "smoke", "--seeds", "0", "--out", str(folder), *smaller])
    document = json.loads((folder / figure / "claims.json").read_text(encoding="utf-8"))
    return {claim["name"] for claim in document["claims"] if not claim["holds"]}
