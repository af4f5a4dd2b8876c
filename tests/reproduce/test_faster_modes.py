"""Figure faster_modes: gradient descent in the eigenbasis, convergence criterion, and rate search."""

import math
from argparse import Namespace

import pytest
import torch

from reproduce.figures import faster_modes
from reproduce.figures.acceleration.descent import (
    ISOLOSS,
    SCALED_FEATURES,
    ConvergenceMonitor,
    Descent,
    LinearProblem,
    Setting,
    fastest_descent,
)
from reproduce.losses import isoloss
from stepwise_lightning import AcceleratedBarlowTwins, BarlowTwins, FixedCropPairs, LinearEncoder
from stepwise_lightning.theory import feature_cross_correlation


def pairs():
    data = FixedCropPairs(num_pairs=40, crop_size=6, seed=0)
    data.setup()
    return data.x1.flatten(1).double(), data.x2.flatten(1).double()


@pytest.mark.parametrize(
    "setting", [Setting("plain", 0.5), Setting("momentum", 0.4, 0.9), Setting("gate", 0.5), Setting("lyapunov", 0.5)]
)
def test_descent_in_the_eigenbasis_matches_training_on_the_pairs(setting):
    x1, x2 = pairs()
    problem = LinearProblem.from_features(x1, x2, (3, 3), 1e-3, seed=0)
    path = problem.descend(setting, 25).path
    encoder = LinearEncoder(108, 3).double()
    with torch.no_grad():
        basis = torch.linalg.eigh(feature_cross_correlation(x1, x2)).eigenvectors.flip(1)
        encoder.weight.copy_(problem.weights0 @ basis.T)
    rate = setting.rate if setting.rule == "lyapunov" else setting.rate / (4 * float(problem.gamma[0]))
    rule = setting.rule if setting.rule in ("gate", "lyapunov") else None
    if rule:
        module = AcceleratedBarlowTwins(encoder, 1.0, rule)
    else:
        module = BarlowTwins(encoder, 1.0, off_diagonal_weight=1.0, normalize=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=setting.momentum)
    for step in range(25):
        z1, z2 = module(x1), module(x2)
        c = (z1.T @ z2 + z2.T @ z1).detach() / (2 * len(z1))
        torch.testing.assert_close(path[step], torch.linalg.eigvalsh(c).flip(0), rtol=1e-5, atol=1e-12)
        optimizer.zero_grad()
        module.loss(z1, z2).backward()
        optimizer.step()
    assert path[25][0] > 100 * path[0][0]  # the first mode has grown


def test_isoloss_in_the_eigenbasis_matches_training_on_the_pairs():
    x1, x2 = pairs()
    problem = LinearProblem.from_features(x1, x2, (3, 3), 1e-3, seed=0)
    descent = problem.descend(Setting(ISOLOSS, 0.5), 25)
    basis = torch.linalg.eigh(feature_cross_correlation(x1, x2)).eigenvectors.flip(1)
    weights, rate = problem.weights0 @ basis.T, 0.5 / (4 * float(problem.gamma[0]))
    for step in range(25):
        z1, z2 = x1 @ weights.T, x2 @ weights.T
        c, moment = (z1.T @ z2 + z2.T @ z1) / (2 * len(z1)), (z1.T @ z1 + z2.T @ z2) / (2 * len(z1))
        shares = torch.linalg.eigvals(torch.linalg.solve(c, moment @ moment)).real.sort(descending=True).values
        torch.testing.assert_close(descent.path[step], shares, rtol=1e-5, atol=1e-9)
        weights.requires_grad_()
        gradient = torch.autograd.grad(isoloss(x1 @ weights.T, x2 @ weights.T), weights)[0]
        weights = (weights - rate * gradient).detach()
    torch.testing.assert_close(descent.final @ basis.T, weights, rtol=1e-9, atol=1e-12)
    assert descent.path[25][0] > 100 * descent.path[0][0]


def test_isoloss_learns_the_second_mode_as_late_as_gradient_descent():
    problem = LinearProblem.from_features(*pairs(), (2, 2), 1e-8, seed=0)
    plain, iso, gate = (problem.descend(Setting(rule, 0.9), 1000).steps for rule in ("plain", ISOLOSS, "gate"))
    assert iso == pytest.approx(plain, rel=0.1) and 4 * gate < iso


def test_monitor_requires_modes_to_remain_learned():
    def run(levels):
        monitor = ConvergenceMonitor(Descent(Setting("plain", 0.1)), max_steps=8)
        steps = next(k for k, level in enumerate(levels) if not monitor.update(level * torch.eye(2)))
        return steps, monitor.descent.steps

    assert run([0.1, 0.1, 0.6, 0.9, 0.9, 0.9]) == (3, 2)
    assert run([0.1, 0.1, 0.6, 0.4, 0.6, 0.9, 0.9, 0.9]) == (6, 4)  # falls below ½ once
    assert run([0.1, 0.1, 1.6, 0.9, 0.9, 0.9]) == (5, 3)  # overshoots 1.5 first
    steps, learned = run([0.1] * 20)
    assert steps == 8 and math.isnan(learned)
    assert run([0.1, 1e9])[0] == 1


def test_fastest_descent_limits_later_settings_to_the_best_steps():
    limits = []

    def run(setting, max_steps):
        limits.append(max_steps)
        return Descent(setting, {1: 90.0, 2: math.nan, 3: 40.0, 4: 60.0}[setting.rate])

    best = fastest_descent(run, [Setting("plain", rate) for rate in (2, 1, 3, 4)], max_steps=200)
    assert best.setting.rate == 3 and limits == [200, 200, 90, 40]


def test_dimension_is_chosen_at_the_widest_gap_and_scaled_features_miss_the_subspace():
    x1, x2 = pairs()
    problem = LinearProblem.from_features(x1, x2, (5, 8), 1e-6, seed=0)
    falls = problem.gamma[5:9] / problem.gamma[4:8]
    assert int(falls.argmin()) == len(problem.weights0) - 5
    lyapunov, control = (
        faster_modes._alignment(problem, problem.descend(setting, 200))
        for setting in (Setting("lyapunov", 0.5), Setting(SCALED_FEATURES, 0.25))
    )
    assert lyapunov > 0.99 and control < 0.9


def test_gate_reduces_the_steps_of_a_wide_network():
    options = Namespace(
        data="photos", num_pairs=20, crop_size=6, root=None, download=False, wide_pairs=20, width=32, wide_dim=2
    )
    steps = {result.rule: result.descent.steps for result in faster_modes.experiment("wide", 0, "", options)}
    assert 2 * steps["gate"] < steps["momentum"] < steps["plain"] and steps["lyapunov"] < steps["momentum"]
