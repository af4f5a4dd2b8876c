"""Ranks that each hold a shard of the batch compute the gradients and weights of one process on the whole batch."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stepwise_lightning import AcceleratedBarlowTwins, BarlowTwins, SimCLR, SpectralContrastive, VICReg
from stepwise_lightning.distributed import DelayedAny, all_gather_with_grad, check_equal_shards
from stepwise_lightning.sync_batchnorm import SyncBatchNorm

GLOBAL_BATCH, IMAGE, STEPS = 12, 8, 20
ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False}
METHODS = {
    "barlow_twins": (BarlowTwins, {}),
    "barlow_twins_analytical": (BarlowTwins, ANALYTICAL),
    "barlow_twins_gate": (AcceleratedBarlowTwins, {"acceleration": "gate", "center": True}),
    "barlow_twins_lyapunov": (AcceleratedBarlowTwins, {"acceleration": "lyapunov"}),
    "simclr": (SimCLR, {}),
    "spectral_contrastive": (SpectralContrastive, {}),
    "vicreg": (VICReg, {}),
}
RATES = {
    "barlow_twins": 0.03,
    "barlow_twins_analytical": 0.03,
    "barlow_twins_gate": 0.003,
    "barlow_twins_lyapunov": 0.03,
    "simclr": 0.1,
    "spectral_contrastive": 0.03,
    "vicreg": 0.01,
}
# Methods trained for STEPS steps: one per kind of gradient. Gradients are compared for all methods.
TRAINED = ("barlow_twins", "barlow_twins_lyapunov", "vicreg")


class Block(nn.Module):
    """Residual block with batch normalisation."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return (x + self.layers(x)).relu()


def resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            Block(6), nn.AvgPool2d(2), Block(6), nn.Flatten(),
            nn.Linear(6 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4),
        )  # fmt: skip


def plain_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE**2, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(steps=STEPS, dtype=torch.float64):
    """Return global batches, (steps, 2 views, samples, 3, h, w), of strongly correlated views."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(steps, 1, GLOBAL_BATCH, 3, IMAGE, IMAGE, dtype=dtype, generator=generator)
    noise = torch.randn(steps, 2, GLOBAL_BATCH, 3, IMAGE, IMAGE, dtype=dtype, generator=generator)
    return common + 0.5 * noise


class Step(nn.Module):
    """Training step without logging, as Lightning wraps it in DDP."""

    def __init__(self, method, encoder):
        super().__init__()
        kind, arguments = METHODS[method]
        self.module = kind(encoder.double(), learning_rate=RATES[method], momentum=0.9, **arguments)

    def forward(self, views):
        return self.module.loss(*(all_gather_with_grad(self.module(view)) for view in views))


def gradients(step, shards):
    step(shards[0]).backward()
    return {name.split("module.")[-1]: p.grad.clone() for name, p in step.named_parameters()}


def trained(step, rate, shards):
    """Train with one step of SGD on each shard; return the losses and the final state."""
    optimizer = torch.optim.SGD(step.parameters(), lr=rate, momentum=0.9)
    losses = []
    for views in shards:
        optimizer.zero_grad()
        loss = step(views)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {name.split("module.")[-1]: value for name, value in step.state_dict().items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **state}


def all_results(wrap, shards):
    """Return gradients without and with batch normalisation, and the result of training, for each method."""
    results = {}
    for method in METHODS:
        results[method, "gradients"] = gradients(wrap(Step(method, plain_network())), shards)
        results[method, "resnet_gradients"] = gradients(wrap(Step(method, resnet())), shards)
        if method in TRAINED:
            results[method, "trained"] = trained(wrap(Step(method, resnet())), RATES[method], shards)
    return results


def wrap_in_ddp(step):
    return DistributedDataParallel(SyncBatchNorm().apply(step))


def unequal_shards_message(rank):
    try:
        check_equal_shards(torch.zeros(3 + rank, 2))
    except ValueError as error:
        return str(error)


def rank_results():
    dist.init_process_group()  # without a name of the back-end
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shard = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    results = all_results(wrap_in_ddp, batches()[:, :, shard])
    results["unequal"] = unequal_shards_message(rank)
    any_rank = DelayedAny(torch.device("cpu"))
    results["flags"] = [any_rank(rank == 1 and call == 1) for call in range(3)]
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def one_process():
    return all_results(lambda step: step, batches())


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, processes):
    """Return the results of each rank."""
    return processes.run_ranks(request.param, rank_results)


def test_ranks_agree_on_a_flag_one_call_late(ranks):
    assert all(results["flags"] == [False, False, True] for results in ranks)
    alone = DelayedAny(torch.device("cpu"))
    assert [alone(False), alone(True)] == [False, True]


def assert_same(actual, expected, tolerance, case):
    """Compare the norm of each tensor's difference, relative to the largest tensor where one is zero up to rounding."""
    assert actual.keys() == expected.keys(), case
    scale = max(value.double().norm() for value in expected.values())
    for name, value in expected.items():
        difference = (actual[name].double() - value.double()).norm()
        assert difference <= tolerance * max(value.double().norm(), 1e-3 * scale), (case, name, difference)


# Not parametrized by method: each worker of pytest-xdist would compute the fixtures.
def test_ddp_gradients_equal_gradients_of_the_whole_batch(one_process, ranks):
    for method, quantity in product(METHODS, ["gradients", "resnet_gradients"]):
        for rank in ranks:
            assert_same(rank[method, quantity], one_process[method, quantity], 1e-10, (method, quantity))


def test_training_with_sync_batchnorm_equals_one_process(one_process, ranks):
    for method in TRAINED:
        expected = one_process[method, "trained"]
        assert expected["losses"][-1] < 0.9 * expected["losses"][0], method  # training makes progress
        for rank in ranks:
            # The order of sums over the batch differs; 20 steps amplify this rounding error.
            assert_same(rank[method, "trained"], expected, 1e-9, method)


def test_unequal_shards_raise_one_line_on_every_rank(ranks):
    sizes = [3 + rank for rank in range(len(ranks))]
    for rank in ranks:
        assert rank["unequal"].startswith(f"every rank must hold equally many samples, but they hold {sizes}: ")


def test_all_gather_in_one_process_returns_its_input():
    z = torch.zeros(3, 2)
    assert all_gather_with_grad(z) is z
    check_equal_shards(z)
