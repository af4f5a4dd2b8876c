"""Figures kernel_pca and kernel_mlp: claims, events and training."""

import csv
import json
import os
from argparse import Namespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_sets import fill

from reproduce.__main__ import main
from reproduce.controls import kernel_matrix_pca, ordinary_kernel_pca, permuted_alignment, procrustes_error
from reproduce.figures import kernel_pca
from reproduce.figures.kernel_over_time import correlation_of_views
from reproduce.options import limit_pairs, require_images
from reproduce.reference import differences
from reproduce.wide_networks import (
    add_small_start,
    kernel_machine,
    project_to_span,
    symmetric_mlp,
    tangent_kernels,
)
from stepwise_lightning import BarlowTwins, FixedCropPairs
from stepwise_lightning.data import load_images
from stepwise_lightning.encoders import MLP
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, linear_kernel, subspace_alignment


@pytest.fixture(scope="module")
def machines(tmp_path_factory, rendered_figures):
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)  # no worker processes, which take seconds to start
        assert main(["kernel_pca", "--profile", "smoke", "--seeds", "0", "--out", str(out)]) == 0
    return out / "kernel_pca"


def test_kernel_pca_claims_hold(machines):
    document = json.loads((machines / "claims.json").read_text(encoding="utf-8"))
    assert {claim["name"] for claim in document["claims"]} == {
        f"{kernel}_{quantity}"
        for kernel in ("rbf", "relu")
        for quantity in ("held_out", "step_times", "values", "eigenfunctions", "norm")
    }
    assert differences(document) == []
    document["claims"][0]["measured"] -= 0.002
    assert len(differences(document)) == 1 and "kernel_pca, rbf_held_out: 0.998" in differences(document)[0]
    document["seeds"] = [1]
    assert differences(document) == ["kernel_pca: seeds are [1], but the reference has [0]"]
    with (machines / "data.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "eigenvalue" and row["kernel"] == "RBF"]
    assert all(abs(float(row["experiment"]) - float(row["theory"])) < 1e-3 for row in rows[-2:])
    with Image.open(machines / "figure.png") as figure:
        assert figure.size[0] > 1000
    for run in document["runs"]:  # ordinary kernel PCA, and chance
        assert run["held_out"] > run["held_out_control"] > run["permuted"]


def test_kernel_pca_writes_events_at_optimiser_steps(machines):
    """Step k is measured after exactly k steps; at a constant learning rate, time is proportional to k."""
    with (machines / "data.csv").open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file)
            if (row["kernel"], row["quantity"], row["mode"]) == ("RBF", "eigenvalue", "1")
        ]  # fmt: skip
    steps, times = ([float(row[column]) for row in rows] for column in ("step", "time"))
    assert steps[0] == 0 and steps[-1] > 5 * len(steps)
    assert times == pytest.approx([step * times[-1] / steps[-1] for step in steps])
    for run, column in (("rbf_seed0", "experiment"), ("rbf_seed0_theory", "theory")):
        board = EventAccumulator(str(machines / "tensorboard" / run), size_guidance={"scalars": 0}).Reload()
        events = board.Scalars("C/eig_001")
        assert [event.step for event in events] == steps
        assert [event.value for event in events] == pytest.approx([float(row[column]) for row in rows], rel=1e-6)
        assert [event.step for event in board.Scalars("At a glance/loss")] == steps


def test_ordinary_kernel_pca_equals_the_closed_form_for_identical_views():
    views = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = linear_kernel(views, views)
    machine = ContrastiveKernelPCA(linear_kernel, 3).fit(views, views)
    torch.testing.assert_close(subspace_alignment(ordinary_kernel_pca(k, k, 3), machine.transform(views)).item(), 1.0)


def test_permuted_alignment_of_identical_views_is_dimension_over_pairs():
    f, g = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same, other = (permuted_alignment(torch.cat([f, f]), torch.cat([h, h]), draws=200) for h in (f, g))
    assert same == pytest.approx(8 / 40, abs=0.02) and other == pytest.approx(8 / 40, abs=0.02)


def test_embedding_of_nearly_equal_eigenvalues_follows_the_closed_form_of_its_start():
    """γ_4/γ_3 is 0.96 with seed 1: the limit of small starts omits the part of mode 4."""
    options = Namespace(num_pairs=60, held_out=40, crop_size=8, dim=3, data="photos", root=None)
    summary = kernel_pca.experiment("RBF", 1, options).summary()
    assert summary["held_out"] > 0.99999 > 0.998 > summary["held_out_limit"] and summary["step_times"] < 3e-3


def test_procrustes_error_is_zero_for_a_rotation_and_grows_with_the_scale():
    f = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(f[:3]).Q
    assert procrustes_error(f, f @ rotation) == pytest.approx(0, abs=1e-7)
    assert procrustes_error(f, 1.2 * f @ rotation) == pytest.approx(0.2)


@pytest.mark.slow
def test_kernel_mlp_claims_hold(tmp_path):
    assert main(["kernel_mlp", "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "kernel_mlp" / "claims.json").read_text(encoding="utf-8"))
    variants = [run["variant"] for run in document["runs"]]
    assert variants == ["rich", "last layer only", "lazy", "lazy", "rich"]
    assert all(run["modes_crossed"] >= 2 for run in document["runs"]) and differences(document) == []


def test_symmetric_network_has_one_tangent_kernel_for_all_outputs():
    encoder, x = symmetric_mlp(5, 7, 3, 0.5, seed=0), torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encoder(x), torch.zeros(4, 3), atol=1e-5, rtol=0)
    add_small_start(encoder, x, 1e-4, seed=0)
    assert encoder(x).square().mean().sqrt().item() == pytest.approx(1e-4, rel=0.01)
    gradients = [
        [torch.autograd.grad(encoder(x)[i, o], list(encoder.parameters())) for i in range(4)] for o in range(3)
    ]
    flat = torch.stack([torch.stack([torch.cat([g.flatten() for g in gs]) for gs in output]) for output in gradients])
    kernels = torch.einsum("oip,qjp->oqij", flat, flat)
    expected = torch.eye(3)[:, :, None, None] * tangent_kernels(encoder, x)["full"].float()
    torch.testing.assert_close(kernels, expected, atol=1e-3 * float(expected.max()), rtol=1e-3)


def test_kernel_machine_matches_a_network_whose_last_layer_trains():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    encoder = symmetric_mlp(5, 8, 2, 0.5, seed=0).double()
    add_small_start(encoder, x, 0.01, seed=0)
    f, (k, _) = encoder(x).detach(), (tangent_kernels(encoder, x)[name] for name in ("last", "full"))
    encoder[1].requires_grad_(False)
    module, rate = BarlowTwins(encoder, 0.01, off_diagonal_weight=1.0, normalize=False), 0.01
    optimiser = torch.optim.SGD(encoder[3].parameters(), lr=rate)
    for _ in range(30):
        optimiser.zero_grad()
        module.loss(*encoder(x).chunk(2)).backward()
        optimiser.step()
    start, end = kernel_machine(k, f, rate, [0, 30])
    torch.testing.assert_close(start, f)
    torch.testing.assert_close(end, encoder(x).detach(), rtol=1e-6, atol=1e-9)
    assert end.norm() > 1.5 * start.norm()


def test_kernel_matrix_with_few_modes_has_the_closed_form_of_these():
    views = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x1, x2 = views, views + torch.tensor([0.1, 0.2, 0.3])
    z = torch.cat([x1, x2])
    machine, embeddings = kernel_matrix_pca(z @ z.T, 5)
    expected = ContrastiveKernelPCA(linear_kernel, 3).fit(x1, x2)
    torch.testing.assert_close(machine.eigenvalues_, expected.eigenvalues_)
    torch.testing.assert_close(subspace_alignment(embeddings, expected.transform(z)).item(), 1.0)
    wrong = ContrastiveKernelPCA(linear_kernel, 1).fit(x1, x2.roll(1, 0))
    torch.testing.assert_close(kernel_matrix_pca(z @ z.T, 1, shift=1)[0].eigenvalues_, wrong.eigenvalues_)


def test_correlation_of_views_is_one_for_equal_features_and_zero_for_others():
    x, y = torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for second, correlation in ((x, 1.0), (x + y, 2 / 3), (y, 0.0)):
        z = torch.cat([x, second]) - torch.cat([x, second]).mean(0)
        assert correlation_of_views(z @ z.T) == pytest.approx(correlation, abs=0.05)


def test_training_in_the_span_of_the_inputs_gives_the_same_outputs():
    pairs = FixedCropPairs(num_pairs=10, crop_size=6, seed=3)
    pairs.setup()
    plain, reduced = (MLP(108, [32], 3, seed=1) for _ in range(2))
    inputs = [pairs.x1, pairs.x2], list(project_to_span(reduced, pairs.x1, pairs.x2))
    assert inputs[1][0].shape == (10, 20) and sum(p.numel() for p in reduced.parameters()) < 1000
    for encoder, views in zip((plain, reduced), inputs, strict=True):
        module = BarlowTwins(encoder, 0.002, off_diagonal_weight=1.0, normalize=False)
        optimiser = torch.optim.SGD(encoder.parameters(), lr=0.002)
        for _ in range(50):
            optimiser.zero_grad()
            module.loss(encoder(views[0]), encoder(views[1])).backward()
            optimiser.step()
    with torch.no_grad():
        expected, output = plain(inputs[0][0]), reduced(inputs[1][0])
        assert not torch.allclose(expected, MLP(108, [32], 3, seed=1)(inputs[0][0]), atol=0.1)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    kernels = [
        EmpiricalNTK(encoder)(views[0], views[1]) for encoder, views in zip((plain, reduced), inputs, strict=True)
    ]
    torch.testing.assert_close(kernels[0], kernels[1], rtol=1e-3, atol=1e-3)


def test_folder_with_fewer_images_than_pairs_is_used_whole(tmp_path, capsys):
    folder = str(fill(tmp_path / "images", 25))
    options = Namespace(data=folder, root="data", download=False, num_pairs=60, held_out=40, crop_size=8)
    assert limit_pairs(options) == {"num_pairs": 15, "held_out": 10}
    assert f"{folder} has 25 images: num_pairs 15 instead of 60, held_out 10 instead of 40" in capsys.readouterr().out
    assert len(kernel_pca._draw(0, options)[0]) == 25
    assert limit_pairs(options) == {}
    options = Namespace(data=folder, root="data", download=False, num_pairs=26)
    assert limit_pairs(options) == {"num_pairs": 25} == {"num_pairs": len(load_images(folder))}
    few = str(fill(tmp_path / "few", 3))
    assert main(["kernel_pca", "--profile", "smoke", "--data", few, "--out", str(tmp_path)]) == 2
    assert f"error: {few!r} has 3 images, and this figure needs at least 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figure", "needed"), [("resnet_barlow_twins", "at least 32 and 64"), ("faster_modes", "at least 256 and 1")]
)
def test_figure_that_trains_resnets_names_the_images_that_it_needs(figure, needed, tmp_path, capsys):
    folder = str(fill(tmp_path / "images", 25))
    assert main([figure, "--profile", "smoke", "--seeds", "0", "--data", folder, "--out", str(tmp_path / "out")]) == 2
    message = f"error: {folder!r} has 23 training and 2 held-out images, and this figure needs {needed}: choose another"
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_images_without_classes_are_refused(tmp_path):
    options = Namespace(data=str(fill(tmp_path / "images", 25)), root="data")
    with pytest.raises(ValueError, match="have no classes, which this figure needs: put each class into a subfolder"):
        require_images(options, 20, 2)
