"""Break the experiment or the theory behind a figure in one way, and see that a claim fails, the one that is named.

The figures are the real ones, at their smallest size, and without the mutation all of their claims hold. Those of one
figure share a table: a mutation is a line with what it breaks, which claim must notice, and the function that does it.
"""

import copy
import inspect
import json
from types import SimpleNamespace

import pytest
import torch

from reproduce.__main__ import main
from reproduce.figures import kernel_mlp, kernel_pca, linear_model, start_scale
from stepwise_lightning import BarlowTwins, FixedCropPairs, losses, record, steps
from stepwise_lightning.encoders import LinearEncoder
from stepwise_lightning.spectrum import measures
from stepwise_lightning.spectrum.schedule import Clock
from stepwise_lightning.theory import ContrastiveKernelPCA, LinearBarlowTwins, feature_cross_correlation

# ---- training ----


def unsymmetrised(patch):
    """C of the loss is z1ᵀ z2 / n."""
    change_source(patch, losses, "barlow_twins_terms", "(c + c.T) / (2 * len(z1))", "c / len(z1)")


def without_half(patch):
    change_source(patch, losses, "barlow_twins_terms", "(c + c.T) / (2 * len(z1))", "(c + c.T) / len(z1)")


def lighter_off_diagonal(patch):
    """Its weight is 0.9."""
    change_source(patch, losses, "barlow_twins_terms", "off_diagonal_weight * _off", "0.9 * off_diagonal_weight * _off")


def adam(patch):
    def configure(module):
        return torch.optim.Adam(module.parameters(), lr=module.hparams["learning_rate"])

    patch.setattr(BarlowTwins, "configure_optimizers", configure)


def momentum(patch):
    def configure(module):
        return torch.optim.SGD(module.parameters(), lr=module.hparams["learning_rate"], momentum=0.5)

    patch.setattr(BarlowTwins, "configure_optimizers", configure)


def ordinary_as_small(patch):
    def encoder(in_features, out_features, init_std=None, seed=0):
        return LinearEncoder(in_features, out_features, None, seed)

    for figure in (linear_model, start_scale):
        patch.setattr(figure, "LinearEncoder", encoder)


def wrong_pairs(patch):
    """Training sees the first view of one image with the second of another."""
    batches = FixedCropPairs.train_dataloader

    def train_dataloader(pairs):
        repeated = batches(pairs)
        repeated.batch = (repeated.batch[0], repeated.batch[1].roll(1, 0))
        return repeated

    patch.setattr(FixedCropPairs, "train_dataloader", train_dataloader)


def noise_images(patch):
    setup = FixedCropPairs.setup

    def setup_with_noise(pairs, stage=None):
        setup(pairs, stage)
        generator = torch.Generator().manual_seed(0)
        pairs.x1, pairs.x2 = (torch.randn(x.shape, generator=generator) for x in (pairs.x1, pairs.x2))

    patch.setattr(FixedCropPairs, "setup", setup_with_noise)


def machine_without_pairs(patch):
    """P = I in the descent of a kernel machine."""
    change_source(patch, kernel_pca, "_train", "f.roll(n, 1)", "f")


def machine_of_wrong_pairs(patch):
    change_source(patch, kernel_pca, "_train", "f.roll(n, 1)", "f.roll(n + 1, 1)")


# ---- theory ----


def half_rate(patch):
    """Modes grow with 4γ instead of 8γ."""
    growth = LinearBarlowTwins._log_growth
    patch.setattr(LinearBarlowTwins, "_log_growth", lambda *arguments: growth(*arguments) / 2)


def one_view(patch):
    """Γ is the covariance of the first views."""
    for figure in (linear_model, start_scale):
        patch.setattr(figure, "feature_cross_correlation", lambda x1, x2: feature_cross_correlation(x1, x1))


def kernel_of_one_view(patch):
    fit = ContrastiveKernelPCA.fit
    patch.setattr(ContrastiveKernelPCA, "fit", lambda self, x1, x2, **options: fit(self, x1, x1.clone(), **options))


def theory_without_pairs(patch):
    """P = I in contrastive kernel PCA: the swap of the views is left out."""

    def fit(self, x1, x2):
        self._views = torch.cat([x1, x2])
        k = self.kernel(self._views, self._views)
        values, vectors = torch.linalg.eigh((k + k.T).double() / 2)
        values, vectors = (part.flip(-1)[..., : self.n_components] for part in (values, vectors))
        self.eigenvalues_, self.coefficients_ = values / len(k), vectors / values.sqrt()
        return self

    patch.setattr(ContrastiveKernelPCA, "fit", fit)


def without_finite_steps(patch):
    """Theory is told of no learning rate."""
    for figure in (linear_model, kernel_pca, start_scale):
        patch.setattr(figure, "LinearBarlowTwins", lambda gamma, start, **_: LinearBarlowTwins(gamma, start))


def centred_kernel(patch):
    """The kernel machine is trained with the kernel as it is, and compared with the closed form of a centred one."""
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


def kernel_that_follows(patch):
    """The tangent kernel at initialisation is that of the network while it trains."""
    patch.setattr(kernel_mlp, "copy", SimpleNamespace(deepcopy=lambda network: network))


def kernel_after_as_before(patch):
    """What is called the kernel after training is that at initialisation."""
    initial, kernel = {}, kernel_mlp.EmpiricalNTK
    patch.setattr(
        kernel_mlp,
        "EmpiricalNTK",
        lambda network: kernel(initial.setdefault(network, copy.deepcopy(network))),
    )


# ---- measurement ----


def time_without_rate(patch):
    patch.setattr(Clock, "time", property(lambda clock: float(clock.steps)))


def float32_spectra(patch):
    change_source(
        patch, measures, "cross_correlation_eigenvalues", "c = z1.T @ z2 / n", "c = z1.float().T @ z2.float() / n"
    )


def lower_threshold(patch):
    """θ is a hundredth of the largest eigenvalue instead of a tenth."""
    change_source(patch, steps, "detect_steps", "0.1 * tail", "0.01 * tail")
    patch.setattr(record, "detect_steps", steps.detect_steps)


SMALLER = {"linear_model": ["--dim", "2"]}
# What each figure is broken by, and a claim that must fail.
MUTATIONS = {
    "linear_model": {},
}


def failing_claims(figure, folder, mutate, patch):
    """Make a figure at its smallest size, broken; return the names of the claims that fail."""
    # Mutations are of this process: nothing may run in another.
    for module in (kernel_mlp, kernel_pca, linear_model, start_scale):
        patch.setattr(module, "each", lambda function, items, title: [function(*item) for item in items])
    mutate(patch)
    main([figure, "--profile", "smoke", "--seeds", "0", "--out", str(folder), *SMALLER.get(figure, [])])
    document = json.loads((folder / figure / "claims.json").read_text(encoding="utf-8"))
    return {claim["name"] for claim in document["claims"] if not claim["holds"]}


def change_source(patch, module, name, old, new):
    """Replace a function of a module by itself with one expression changed."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1, f"{name} has changed: {old!r} is not in it"
    namespace = dict(vars(module))
    exec(compile(source.replace(old, new), module.__file__, "exec"), namespace)
    patch.setattr(module, name, namespace[name])
