"""Accelerated gradients: agreement with the loss, the equations they solve, and faster training."""

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from reproduce.figures.acceleration.grids import RESNET
from reproduce.figures.faster_modes import PROFILES
from stepwise_lightning import (
    MLP,
    AcceleratedBarlowTwins,
    BarlowTwins,
    Encoder,
    LinearEncoder,
    TwoViewDataModule,
    barlow_twins_loss,
)
from stepwise_lightning.modules.acceleration import gate, gate_limit, lyapunov, record_last_inputs, with_gradient

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(size, seed=0):
    a = draw(size, size, seed=seed)
    return (a + a.T) / 2


def views(n=40, m=12):
    """Return two views (n, m) whose Γ has well separated eigenvalues."""
    common = draw(n, m, seed=1) * torch.logspace(0, -1.5, m, dtype=torch.float64)
    return common + 0.05 * draw(n, m, seed=2), common + 0.05 * draw(n, m, seed=3)


def gradient(module, x1, x2):
    module.zero_grad()
    module.loss(module(x1), module(x2)).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("center", [False, True])
def test_matrix_of_gradient_descent_gives_the_gradient_of_the_loss(center, monkeypatch):
    monkeypatch.setattr("stepwise_lightning.modules.acceleration.gate", lambda c: 4 * (torch.eye(len(c)) - c))
    x1, x2 = (x + 0.3 for x in views())  # nonzero means
    encoder = MLP(12, [16], 3, seed=1).double()
    plain = BarlowTwins(copy.deepcopy(encoder), 0.1, center=center, **ANALYTICAL)
    accelerated = AcceleratedBarlowTwins(encoder, 0.1, "gate", center=center)
    torch.testing.assert_close(gradient(accelerated, x1, x2), gradient(plain, x1, x2), rtol=1e-12, atol=1e-14)


def test_gate_matches_its_formula():
    q = torch.linalg.qr(draw(4, 4)).Q
    eigenvalues = torch.tensor([1.2, 0.99, 0.5, -0.3], dtype=torch.float64)
    p = gate((q * eigenvalues) @ q.T, floor=1e-2)
    expected = [4 * -0.2 / 1.21, 4 * 0.01 / 1.0, 4 * 0.5 / 0.51, 4 * 1.3 / 0.01]
    torch.testing.assert_close(q.T @ p @ q, torch.diag(torch.tensor(expected, dtype=torch.float64)))


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.5])
def test_lyapunov_equals_the_solution_with_kronecker_products(floor):
    c, g = 0.5 * symmetric(5), draw(5, 7, seed=4)
    s, identity = g @ g.T, torch.eye(5, dtype=torch.float64)
    eigenvalues, q = torch.linalg.eigh(c)
    top = torch.linalg.matrix_norm(c, 2)
    target = sum(
        2 * (1 - x) * max(abs(x), floor * top) * torch.outer(v, v) for x, v in zip(eigenvalues, q.T, strict=True)
    )
    solution = torch.linalg.solve(torch.kron(s, identity) + torch.kron(identity, s), target.flatten()).reshape(5, 5)
    p = lyapunov(c, s, floor)
    torch.testing.assert_close(p, solution, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p @ s + s @ p, target, rtol=1e-9, atol=1e-9)
    assert torch.equal(p, p.T)


def test_lyapunov_is_zero_in_directions_without_a_gradient():
    assert not lyapunov(torch.zeros(3, 3), torch.zeros(3, 3)).any()
    c = torch.diag(torch.tensor([0.5, 0.0]))
    p = lyapunov(c, torch.diag(torch.tensor([2.0, 0.0])))
    torch.testing.assert_close(p, torch.diag(torch.tensor([0.125, 0.0], dtype=torch.float64)))


def eigenvalues_of_c(module, x1, x2):
    z1, z2 = module(x1).detach(), module(x2).detach()
    c = z1.T @ z2 / len(z1)
    return torch.linalg.eigvalsh((c + c.T) / 2).flip(0)


def descend(module, rate, steps, x1, x2):
    """Return the eigenvalues of C before each step and after the last."""
    optimizer, path = torch.optim.SGD(module.parameters(), lr=rate), [eigenvalues_of_c(module, x1, x2)]
    for _ in range(steps):
        optimizer.zero_grad()
        module.loss(module(x1), module(x2)).backward()
        optimizer.step()
        path.append(eigenvalues_of_c(module, x1, x2))
    return torch.stack(path)


def views_with_negative_eigenvalue():
    """Return two views whose Γ is diag(1, ½, ¼, 0.1, −0.6)."""
    gamma = torch.tensor([1.0, 0.5, 0.25, 0.1, -0.6], dtype=torch.float64)
    x = torch.diag((5 * gamma.abs()).sqrt())
    return x, x * gamma.sign()


def test_gate_diverges_above_the_limit_of_the_smallest_eigenvalue_and_trains_below():
    x1, x2 = views_with_negative_eigenvalue()
    limit = gate_limit(x1, x2)
    assert limit == pytest.approx(0.01 / (2 * 0.6)) and gate_limit(x1, x1) == pytest.approx(1 / 4)
    for rate, diverges in ((0.9 * limit, False), (2 * limit, True), (0.1 / 4, True)):  # a tenth of 1/(4γ_1)
        module = AcceleratedBarlowTwins(LinearEncoder(5, 4, 1e-6, seed=0).double(), rate, "gate")
        if diverges:
            with pytest.raises(torch.linalg.LinAlgError):  # infinite weights
                descend(module, rate, 40, x1, x2)
        else:
            path = descend(module, rate, 200, x1, x2)
            assert path.max() < 1.5 and path[-1].min() > 0.5
            aligned = torch.linalg.qr(module.encoder.weight.detach().T).Q[:4]
            torch.testing.assert_close(aligned.square().sum(), torch.tensor(4.0).double(), rtol=1e-3, atol=0)


def test_trainer_warns_of_a_rate_above_the_limit_of_the_first_batch(recwarn):
    batch = [x.float() for x in views_with_negative_eigenvalue()]
    loader = torch.utils.data.DataLoader([batch] * 3, batch_size=None)
    for rate, count in ((0.008, 0), (0.009, 1)):
        module = AcceleratedBarlowTwins(LinearEncoder(5, 4, 1e-6), rate, "gate")
        trainer = L.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        texts = [str(warning.message) for warning in recwarn if "of the gate" in str(warning.message)]
        assert len(texts) == count and not module.encoder._forward_hooks
    assert (
        texts[0].startswith("learning_rate 0.009 is not below 0.0083, the limit of the gate") and "\n" not in texts[0]
    )


@pytest.mark.slow
def test_rate_of_the_resnet_of_faster_modes_is_below_its_limit():
    for profile in ("smoke", "cpu"):
        settings = PROFILES[profile]
        data = TwoViewDataModule("photos", "weak", settings["image_size"], settings["resnet_batch"], seed=0)
        data.setup("fit")
        encoder = Encoder(4, "resnet_small", projector_depth=2, hidden_features=128, alpha=1e-3, seed=0)
        inputs = record_last_inputs(encoder)
        [encoder(view) for view in next(iter(data.train_dataloader()))[:2]]
        assert gate_limit(*inputs, center=True) > RESNET["gate"].rate


@pytest.mark.parametrize("center", [False, True])
def test_lyapunov_grows_every_mode_of_a_linear_model_at_the_same_rate(center):
    x1, x2 = views()
    x1, x2 = (x1 - x1.mean(0), x2 - x2.mean(0)) if center else (x1, x2)
    encoder = LinearEncoder(12, 3).double()
    with torch.no_grad():  # aligned with the eigenvectors of Γ
        gamma, v = torch.linalg.eigh((x1.T @ x2 + x2.T @ x1) / (2 * len(x1)))
        encoder.weight.copy_(1e-3 * torch.linalg.qr(draw(3, 3)).Q @ v[:, [-1, -3, -5]].T)
    assert 500 > gamma[-1] / gamma[-5] > 5
    module = AcceleratedBarlowTwins(encoder, 1.0, "lyapunov", center=center)
    path = descend(module, 0.05, 60, x1, x2)
    # λ ← λ (1 + η (1 − λ))², up to round-off, for modes above the floor
    torch.testing.assert_close(path[1:], path[:-1] * (1 + 0.05 * (1 - path[:-1])) ** 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "acceleration"),
    [
        ("linear", "gate"),
        ("mlp", "lyapunov"),
        *(pytest.param("layer", each, marks=pytest.mark.slow) for each in ("gate", "lyapunov")),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("linear", "lyapunov"), ("mlp", "gate"))),
    ],
)
def test_all_modes_are_learned_in_fewer_steps_and_stay_learned(acceleration, kind):
    x1, x2 = views()
    networks = {"linear": LinearEncoder(12, 4, 1e-3), "layer": torch.nn.Linear(12, 4), "mlp": MLP(12, [64], 4)}
    network = networks[kind].double()
    with torch.no_grad():
        [p.mul_(1e-3) for p in list(network.parameters())[-2:] if kind != "linear"]
    plain = BarlowTwins(copy.deepcopy(network), 1.0, **ANALYTICAL)
    accelerated = AcceleratedBarlowTwins(network, 1.0, acceleration)
    # The other layers of a network change C too, so Lyapunov needs a smaller learning rate there.
    rate = 0.1 if acceleration == "gate" else 0.3 if kind == "mlp" else 0.5
    path = descend(accelerated, rate, 100, x1, x2)
    assert (path[-1] > 0.99).all() and (path[-1] < 1.01).all()
    assert 2.5 * steps_until_learned(path) < steps_until_learned(descend(plain, 0.1, 100, x1, x2))


def steps_until_learned(path):
    """Return the first step at which all eigenvalues exceed ½, or the number of measurements."""
    return (path.min(1).values < 0.5).sum().item()


def test_bias_acts_as_the_weight_of_a_constant_feature():
    x1, x2 = views()
    layer = torch.nn.Linear(12, 3).double()
    joined = LinearEncoder(13, 3).double()
    with torch.no_grad():
        joined.weight.copy_(torch.cat([layer.weight, layer.bias[:, None]], 1))
    with_bias, without = (AcceleratedBarlowTwins(e, 0.1, "lyapunov") for e in (layer, joined))
    extended = [torch.cat([x, torch.ones(len(x), 1).double()], 1) for x in (x1, x2)]
    a, b = gradient(with_bias, x1, x2), gradient(without, *extended).reshape(3, 13)
    torch.testing.assert_close(a, torch.cat([b[:, :-1].flatten(), b[:, -1]]), rtol=1e-9, atol=1e-12)


def test_value_equals_the_loss_and_copies_record_separate_inputs():
    x1, x2 = views()
    module = AcceleratedBarlowTwins(MLP(12, [8], 3).double(), 0.1, "lyapunov")
    z1, z2 = module(x1), module(x2)
    assert float(module.loss(z1, z2).detach()) == float(barlow_twins_loss(z1, z2, **ANALYTICAL).detach())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other(x1[:5]), other(x2[:5])
        other.loss(other(x1), other(x2)).backward()
    module.loss(z1, z2).backward()  # raises if the copies had overwritten its inputs


def test_terms_of_an_infinite_loss_are_returned_unchanged():
    z = torch.full((4, 2), torch.nan)
    terms = {"on_diagonal": torch.tensor(torch.nan), "off_diagonal": torch.tensor(0.0)}
    assert with_gradient(z, z, terms, "gate", center=False) is terms


@pytest.mark.parametrize("acceleration", ["gate", "lyapunov"])
def test_trainer_logs_the_loss_and_checkpoints_restore_the_module(acceleration, tmp_path):
    x1, x2 = (x.float() for x in views())
    loader = torch.utils.data.DataLoader([(x1, x2)] * 30, batch_size=None)
    module = AcceleratedBarlowTwins(MLP(12, [8], 3), 0.01, acceleration, center=True)
    trainer = L.Trainer(
        max_steps=30, accelerator="cpu", logger=CSVLogger(tmp_path, name="run"), enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=30,
    )  # fmt: skip
    before = []
    module.optimizer_zero_grad = lambda *_: before.append(copy.deepcopy(module.encoder.state_dict()))
    trainer.fit(module, loader)
    module.encoder.load_state_dict(before[-1])
    loss = barlow_twins_loss(module(x1), module(x2), center=True, **ANALYTICAL)
    assert trainer.logged_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    restored = AcceleratedBarlowTwins.load_from_checkpoint(tmp_path / "end.ckpt", encoder=MLP(12, [8], 3))
    assert restored.hparams["acceleration"] == acceleration
    with pytest.raises(ValueError, match="use the class AcceleratedBarlowTwins"):
        BarlowTwins.load_from_checkpoint(tmp_path / "end.ckpt", encoder=MLP(12, [8], 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"acceleration": "newton"}, "must be 'gate' or 'lyapunov', got 'newton'"),
        ({"acceleration": "gate", "normalize": True}, "analytical loss, got normalize=True and off_diagonal_weight=1"),
        (
            {"acceleration": "gate", "off_diagonal_weight": 0.5},
            "got normalize=False and off_diagonal_weight=0.5: set normalize=False and off_diagonal_weight=1",
        ),
    ],
)
def test_other_accelerations_and_losses_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        AcceleratedBarlowTwins(LinearEncoder(4, 2), 0.1, **settings)


def test_acceleration_of_barlow_twins_names_the_new_class():
    assert BarlowTwins(LinearEncoder(4, 2), 0.1, acceleration=None).trains_with_sgd
    with pytest.raises(ValueError, match="no acceleration='gate' any more: use the class AcceleratedBarlowTwins"):
        BarlowTwins(LinearEncoder(4, 2), 0.1, acceleration="gate")


def test_lyapunov_requires_an_encoder_that_ends_in_a_linear_layer():
    with pytest.raises(ValueError, match="but Flatten has no linear layer: choose 'gate'"):
        AcceleratedBarlowTwins(torch.nn.Flatten(), 0.1, "lyapunov")
    network = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())
    module = AcceleratedBarlowTwins(network, 0.1, "lyapunov")
    with pytest.raises(ValueError, match="needs an encoder that ends in its last linear layer, but Sequential does"):
        module(torch.ones(3, 4))


def test_lyapunov_requires_a_call_of_the_encoder_before_the_loss():
    module = AcceleratedBarlowTwins(LinearEncoder(4, 2), 0.1, "lyapunov")
    with pytest.raises(ValueError, match=r"for each view before the loss, got embeddings of 3 pairs and .* for \[\]"):
        module.loss(torch.ones(3, 2), torch.ones(3, 2))


def test_inputs_of_the_last_layer_of_an_encoder_are_recorded():
    encoder = Encoder(out_features=3, backbone="resnet_small", projector_depth=2, hidden_features=8)
    inputs = record_last_inputs(encoder)
    embeddings = [encoder(torch.rand(4, 3, 16, 16)) for _ in range(3)]
    last = encoder.projector[-1]
    for h, z in zip(inputs, embeddings[1:], strict=True):
        torch.testing.assert_close(h @ torch.cat([last.weight, last.bias[:, None]], 1).T, z)
