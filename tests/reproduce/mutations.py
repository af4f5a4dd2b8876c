"""Mutations of experiments and theories: functions that patch this process; see ``test_mutations.py``."""

import inspect
from dataclasses import replace

import torch

from reproduce import kernel_machines, linear_models, mode_rates, wide_networks
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
    change_source(patch, steps, "detect_steps", "0.1 * _level", "0.01 * _level")
    patch.setattr(record, "detect_steps", steps.detect_steps)
