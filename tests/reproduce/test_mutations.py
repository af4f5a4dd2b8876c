"""Mutation tests: change one thing in an experiment or theory, and check that the named claim fails.

The figures run with the smoke profile, with which all claims hold. A mutation is a function in ``mutations.py`` and a
line in ``MUTATIONS``.
"""

import json
from pathlib import Path

import mutations
import pytest

from reproduce.__main__ import main
from reproduce.figures import any_loss, kernel_mlp, kernel_pca, linear_model, start_scale

# (figure, mutation, claim that must fail). reproduce/README.md contains the same table.
MUTATIONS = [
    ("linear_model", mutations.unsymmetrised, "objective"),
    ("linear_model", mutations.without_half, "objective"),
    ("linear_model", mutations.lighter_off_diagonal, "objective"),
    ("linear_model", mutations.adam, "crossed"),
    ("linear_model", mutations.momentum, "crossed"),
    ("linear_model", mutations.ordinary_as_small, "distinct"),
    ("linear_model", mutations.wrong_pairs, "crossed"),
    ("linear_model", mutations.noise_images, "distinct"),
    ("linear_model", mutations.half_rate, "crossed"),
    ("linear_model", mutations.one_view, "crossed"),
    ("linear_model", mutations.doubled_exponent, "aligned"),
    ("linear_model", mutations.wrong_recursion, "recursion"),
    ("linear_model", mutations.ordinary_as_small, "norm"),
    ("linear_model", mutations.norm_without_root, "norm"),
    ("linear_model", mutations.without_finite_steps, "deviation"),
    ("linear_model", mutations.time_without_rate, "crossed"),
    ("linear_model", mutations.float32_spectra, "log_deviation"),
    ("linear_model", mutations.lower_threshold, "detected"),
    ("start_scale", mutations.ordinary_as_small, "linear_plateaus"),
    ("start_scale", mutations.half_rate, "linear_deviation"),
    ("start_scale", mutations.without_finite_steps, "linear_deviation"),
    ("kernel_pca", mutations.machine_without_pairs, "relu_held_out"),
    ("kernel_pca", mutations.machine_of_wrong_pairs, "rbf_held_out"),
    ("kernel_pca", mutations.theory_without_pairs, "relu_held_out"),
    ("kernel_pca", mutations.kernel_of_one_view, "relu_held_out"),
    ("kernel_pca", mutations.centred_kernel, "rbf_held_out"),
    ("kernel_pca", mutations.doubled_exponent, "rbf_values"),
    ("kernel_pca", mutations.transform_with_gamma, "relu_values"),
    ("kernel_pca", mutations.squared_course, "rbf_values"),
    ("kernel_pca", mutations.contrastive_kernel_of_one_view, "relu_eigenfunctions"),
    ("kernel_pca", mutations.norm_without_root, "rbf_norm"),
    ("kernel_pca", mutations.half_rate, "rbf_step_times"),
    ("kernel_pca", mutations.without_finite_steps, "relu_step_times"),
    ("kernel_mlp", mutations.wrong_pairs, "embedding"),
    ("kernel_mlp", mutations.frozen_hidden_layer, "embedding"),
    ("kernel_mlp", mutations.last_layer_kernel, "embedding"),
    ("kernel_mlp", mutations.half_target, "scale"),
    ("kernel_mlp", mutations.theory_without_pairs, "final"),
    ("kernel_mlp", mutations.kernel_of_one_view, "step_times"),
    ("kernel_mlp", mutations.column_norms, "step_times"),
    ("kernel_mlp", mutations.half_rate, "step_times"),
    ("kernel_mlp", mutations.time_without_rate, "step_times"),
    ("kernel_mlp", mutations.nngp_kernel, "infinite_width"),
    ("kernel_mlp", mutations.kernel_after_as_before, "moved"),
    ("any_loss", mutations.signature_of_vicreg, "linear_order"),
    ("any_loss", mutations.wrong_pairs, "linear_median"),
    ("any_loss", mutations.rates_of_gradient_flow, "linear_rates"),
    ("any_loss", mutations.self_similarity, "linear_closed_form"),
    ("any_loss", mutations.squared_hinge, "wide_closed_form"),
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
    smaller = [] if mutate is mutations.float32_spectra else SMALLER.get(figure, [])
    main([figure, "--profile", "smoke", "--seeds", "0", "--out", str(folder), *smaller])
    document = json.loads((folder / figure / "claims.json").read_text(encoding="utf-8"))
    return {claim["name"] for claim in document["claims"] if not claim["holds"]}
