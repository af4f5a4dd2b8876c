"""Mutation tests of the figures with trained networks, as in ``test_mutations``.

Other processes train the networks, once. Mutations of training change their command line.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reproduce.__main__ import main
from reproduce.figures import frozen_features, kernel_over_time
from reproduce.networks.runs import Run, SGDSettings
from reproduce.networks.variants import VARIANTS
from reproduce.wide_networks import KERNELS
from stepwise_lightning import BarlowTwins
from stepwise_lightning.callbacks.clock import Clock
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation


def as_if_small(variant):
    def mutate(patch):
        patch.setitem(VARIANTS, "small", VARIANTS[variant])

    mutate.__name__ = f"{variant}_as_small"
    return mutate


ordinary, wrong_pairs, noise_images, identical_views = map(
    as_if_small, ("ordinary", "wrong_pairs", "noise_images", "identical_views")
)
ordinary.__doc__ = "Use ordinary instead of small initialisation."
wrong_pairs.__doc__ = "Train on wrong pairs."
noise_images.__doc__ = "Train on images of noise, at the rate of the photographs."
identical_views.__doc__ = "Train on two identical views."


def staircase_as_control(patch):
    """Train the control with wrong pairs on correct pairs."""
    patch.setitem(VARIANTS, "wrong_pairs", VARIANTS["small"])


def one_run(patch):
    """Use one run for all three losses."""
    embeddings = Run.embeddings

    def of_barlow_twins(run, learned):
        return embeddings(Run("barlow_twins", run.variant, run.seed, run.options), learned)

    patch.setattr(Run, "embeddings", of_barlow_twins)


def permuted_images(patch):
    """Compare embeddings of images in different orders."""
    embedded = Run.embedded

    def reordered(run, index):
        z = embedded(run, index)
        return z.roll(7 * run.seed + len(run.loss), 0)

    patch.setattr(Run, "embedded", reordered)


def kernel_of_the_start(patch):
    """Use the kernels at initialisation as the current kernels."""
    kernels, first = kernel_over_time.kernels, {}
    # The first call is for the initial network.
    patch.setattr(
        kernel_over_time, "kernels", lambda encoder, pairs: first.setdefault(id(pairs), kernels(encoder, pairs))
    )


def kernel_of_all_layers(patch):
    """Use the tangent kernel of all layers as the last layer's kernel."""
    patch.setitem(KERNELS, "last", "all")


def closed_form_of_wrong_pairs(patch):
    """Use wrong pairs in the closed forms."""
    fit = kernel_over_time.kernel_matrix_pca
    patch.setattr(kernel_over_time, "kernel_matrix_pca", lambda k, modes, shift=0: fit(k, modes, shift + 1))


def scaled_forecast(factor, text):
    def mutate(patch):
        def scaled(*arguments):
            settings = of(*arguments)
            return replace(settings, rates=factor * settings.rates)

        of = SGDSettings.of
        patch.setattr(SGDSettings, "of", scaled)

    mutate.__name__, mutate.__doc__ = f"rates_times_{factor}", text
    return mutate


other_growth = scaled_forecast(0.5, "Use a growth rate of 4γ instead of 8γ in the forecast.")
two_thirds, four_fifths = (scaled_forecast(f, f"Multiply the rates of the forecast by {f}.") for f in (0.67, 0.8))


def without_momentum(patch):
    """Omit momentum in the forecast."""
    of = SGDSettings.of
    patch.setattr(SGDSettings, "of", lambda *arguments: replace(of(*arguments), momentum=0.0))


def half_rate(patch):
    """Use a growth rate of 4γ instead of 8γ in the theory."""
    growth = LinearBarlowTwins._log_growth
    patch.setattr(LinearBarlowTwins, "_log_growth", lambda *arguments: growth(*arguments) / 2)


def one_view(patch):
    """Compute Γ from the first views only."""
    patch.setattr(frozen_features, "feature_cross_correlation", lambda x1, x2: feature_cross_correlation(x1, x1))


def momentum(patch):
    """Train the last layer with momentum that the theory ignores."""

    def configure(module):
        return torch.optim.SGD(module.parameters(), lr=module.hparams["learning_rate"], momentum=0.5)

    patch.setattr(BarlowTwins, "configure_optimizers", configure)


def time_without_rate(patch):
    """Omit the learning rate in the effective time."""
    patch.setattr(Clock, "time", property(lambda clock: float(clock.steps)))


# (figure, mutation, claim that must fail). reproduce/README.md contains the same table.
MUTATIONS = [
    ("three_losses", ordinary, "barlow_twins_steps"),
    ("three_losses", wrong_pairs, "barlow_twins_steps"),
    ("resnet_barlow_twins", noise_images, "steps"),
    ("resnet_barlow_twins", identical_views, "views"),
    ("resnet_barlow_twins", other_growth, "not_early"),
    ("resnet_barlow_twins", two_thirds, "first_not_early"),
    ("resnet_barlow_twins", four_fifths, "first_not_early"),
    ("resnet_barlow_twins", without_momentum, "not_early"),
    ("standard_init", ordinary, "simclr_small"),
    ("negative_controls", staircase_as_control, "wrong_pairs"),
    ("cross_loss_alignment", one_run, "differ"),
    ("cross_loss_alignment", permuted_images, "aligned"),
    ("kernel_over_time", kernel_of_the_start, "barlow_twins_moved"),
    ("kernel_over_time", kernel_of_all_layers, "barlow_twins_over_full"),
    ("kernel_over_time", closed_form_of_wrong_pairs, "barlow_twins_pairs"),
    ("frozen_features", half_rate, "times"),
    ("frozen_features", one_view, "deviation"),
    ("frozen_features", momentum, "times"),
    ("frozen_features", time_without_rate, "times"),
]
FIGURES = list(dict.fromkeys(figure for figure, _, _ in MUTATIONS))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with all figures without mutation, and their runs."""
    folder = tmp_path_factory.mktemp("original")
    for figure in FIGURES:
        make(figure, folder)
    return folder


def make(figure, folder):
    main([figure, "--profile", "smoke", "--seeds", "0", "--out", str(folder), "--resume"])


def failing(figure, folder):
    document = json.loads((folder / figure / "claims.json").read_text(encoding="utf-8"))
    return {claim["name"] for claim in document["claims"] if not claim["holds"]}


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "mutate", "claim"), MUTATIONS, ids=lambda part: getattr(part, "__name__", part))
def test_mutation_fails_the_claim(figure, mutate, claim, trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    for module in (frozen_features, kernel_over_time):  # patches apply to this process only
        monkeypatch.setattr(module, "map_parallel", lambda function, items, title: [function(*item) for item in items])
    mutate(monkeypatch)
    make(figure, tmp_path)
    assert claim in failing(figure, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("figure", FIGURES)
def test_all_claims_hold_without_mutation(figure, trained):
    assert failing(figure, trained) == set()


def test_readme_lists_the_mutations():
    text = (Path(__file__).parents[2] / "reproduce" / "README.md").read_text(encoding="utf-8")
    rows = [f"| {mutate.__doc__} | `{figure}` | `{claim}` |" for figure, mutate, claim in MUTATIONS]
    start = text.index("| mutation of networks | figure |")
    assert text[start:].split("\n\n")[0].splitlines()[2:] == rows
