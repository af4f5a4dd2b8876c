"""Checks of losses: the shipped losses pass, faults of published libraries are found."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed.nn.functional import all_gather, all_reduce

from stepwise_lightning import barlow_twins_loss, check_loss, simclr_loss, vicreg_loss
from stepwise_lightning.loss_checks import two_ranks
from stepwise_lightning.losses import LOSSES

DIM, NUM_PAIRS = 5, 12


def rows(report):
    return {row.check: row for row in report.rows}


def is_parallel():
    return dist.is_initialized() and dist.get_world_size() > 1


def standardized(z):
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def loss_of_correlation(c):
    return (c - torch.eye(len(c)).to(c)).square().sum()


def gathered_without_gradient(z1, z2):
    """SimCLR on gathered embeddings, of which only this rank's have a gradient."""
    return simclr_loss(*(_gather(z, with_gradient=False) for z in (z1, z2)))


def gathered_with_gradient(z1, z2):
    return simclr_loss(*(_gather(z, with_gradient=True) for z in (z1, z2)))


def world_size_times_mean(z1, z2):
    return gathered_with_gradient(z1, z2) * (dist.get_world_size() if is_parallel() else 1)


def negatives_without_gradient(z1, z2):
    """Contrast of this rank's pairs with gathered negatives, which have no gradient."""
    z1, z2 = F.normalize(z1), F.normalize(z2)
    logits = z1 @ _gather(z2, with_gradient=False).T / 0.5
    return F.cross_entropy(logits, torch.arange(len(z1)) + (dist.get_rank() * len(z1) if is_parallel() else 0))


def _gather(z, with_gradient):
    if not is_parallel():
        return z
    if with_gradient:
        return torch.cat(all_gather(z))
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z
    return torch.cat(parts)


def statistics_of_each_shard(z1, z2):
    """Barlow Twins of lightly 1.5.26 to 1.6.0: a mean correlation of shards that are normalised one by one."""
    c = standardized(z1).T @ standardized(z2) / len(z1)
    return loss_of_correlation(all_reduce(c / dist.get_world_size()) if is_parallel() else c)


def reduced_without_gradient(z1, z2):
    """Barlow Twins of lightly before 1.5.26, where the reduction has no gradient."""
    c = standardized(z1).T @ standardized(z2) / len(z1)
    if is_parallel():
        c = c / dist.get_world_size()
        dist.all_reduce(c)
    return loss_of_correlation(c)


def views_together(z1, z2):
    """Barlow Twins of lightly before 1.5.20, with mean and variance of both views."""
    z1, z2 = standardized(torch.cat([z1, z2])).chunk(2)
    return loss_of_correlation(z1.T @ z2 / len(z1))


@pytest.mark.parametrize("name", LOSSES)
def test_shipped_losses_pass(name):
    h1, h2 = torch.randn(1, NUM_PAIRS, 7) + 0.5 * torch.randn(2, NUM_PAIRS, 7)
    report = check_loss(name, DIM, NUM_PAIRS, h1, h2)
    assert report.passed and not any(row.result == "not checked" for row in report.rows)
    found = rows(report)
    assert found["two ranks in JointEmbedding"].result == "pass"
    assert found["growing modes"].value.startswith("5 of 5, growth rates ")
    assert ("give the last layer a bias" == found["equal embeddings"].remedy) == (name == "simclr")
    assert str(report).splitlines()[0].split(" | ")[0].strip() == "check" and len(str(report).splitlines()) == 15


@pytest.mark.parametrize(
    ("loss", "check", "value"),
    [
        (gathered_without_gradient, "two ranks", "gradient divided by the number of ranks"),
        (world_size_times_mean, "two ranks", "gradient multiplied by the number of ranks"),
        (negatives_without_gradient, "two ranks", "right loss, but its gradient deviates by "),
        (statistics_of_each_shard, "two ranks", "mean loss of the ranks "),
        (reduced_without_gradient, "two ranks", "gradient divided by the number of ranks; mean loss of the ranks "),
        (views_together, "scale of views", "the views are normalised together"),
    ],
)
def test_faults_of_published_losses_are_found(loss, check, value):
    report = check_loss(loss, DIM, NUM_PAIRS)
    assert not report.passed
    assert [row.check for row in report.rows if row.result == "fail"] == [check]
    assert rows(report)[check].value.startswith(value) and rows(report)[check].remedy


def test_loss_that_gathers_passes_and_joint_embedding_gathers_again():
    report = check_loss(gathered_with_gradient, DIM, NUM_PAIRS)
    assert report.passed and rows(report)["two ranks"].result == "pass"
    assert rows(report)["two ranks in JointEmbedding"].result == "note"
    assert "gather_distributed=False" in rows(report)["two ranks in JointEmbedding"].remedy


def in_place(z1, z2):
    z1 -= z1.mean(0)
    return (z1 - z2).square().mean()


class Queue(nn.Module):
    """Compares a batch with the previous one."""

    previous = 0.0

    def forward(self, z1, z2):
        loss = (z1 - z2 + self.previous).square().mean()
        self.previous = z1.detach()
        return loss


def communicates_always(z1, z2):
    loss = (z1 - z2).square().mean()
    dist.all_reduce(loss)
    return loss


@pytest.mark.parametrize(
    ("loss", "check", "value"),
    [
        (lambda z1, z2: (z1 - z2).square().mean(1), "value", "the loss must return a scalar tensor"),
        (lambda z1, z2: {"loss": (z1 - z2).square().mean(), "extra": z1.sum()}, "value", "the loss is the sum of its "),
        (lambda z1, z2: z1.detach().square().mean(), "value", "has no gradient"),
        (lambda z1, z2: (z1 - z1).norm(dim=1).mean() / (z2 - z2).norm(), "value", "nan or its gradient is not finite"),
        (in_place, "value", "changes its inputs"),
        (nn.CosineEmbeddingLoss(), "value", "the loss is called with two arguments"),
        (communicates_always, "value", "ValueError: Default process group has not been initialized"),
        (Queue(), "repeated call", "gradients differ at equal random seeds"),
        (lambda z1, z2: ((z1 - z2).square().mean(1) * torch.arange(len(z1))).mean(), "order of pairs", "gradients dev"),
    ],
)  # fmt: skip
def test_unusable_losses_fail(loss, check, value):
    report = check_loss(loss, DIM, NUM_PAIRS)
    assert [row.check for row in report.rows if row.result == "fail"] == [check]
    assert rows(report)[check].value.startswith(value) and rows(report)[check].remedy


def only_float32(z1, z2):
    assert z1.dtype == torch.float32
    return barlow_twins_loss(z1, z2)


def random_projection(z1, z2):
    return ((z1 - z2) @ torch.randn(z1.shape[1], 3).to(z1)).square().mean()


def test_losses_with_restrictions_get_notes():
    found = rows(check_loss(only_float32, DIM, NUM_PAIRS))
    assert {found[check].result for check in ("equal embeddings", "bfloat16", "float16")} == {"note"}
    assert found["two ranks in JointEmbedding"].result == "pass"
    state = torch.get_rng_state()
    found = rows(check_loss(random_projection, DIM, NUM_PAIRS))
    assert found["repeated call"].result == "note" and found["two ranks"].result == "pass"
    assert torch.equal(torch.get_rng_state(), state)
    overflowing = rows(check_loss(lambda z1, z2: (300 * (z1 - z2)).square().sum(), DIM, NUM_PAIRS))["float16"]
    assert overflowing.result == "note" and "not finite" in overflowing.value
    one_pair = rows(check_loss(lambda z1, z2: (z1.var(0) - z2.var(0)).square().sum(), DIM, NUM_PAIRS))["one pair"]
    assert one_pair.result == "note" and "drop_last" in one_pair.remedy


def test_loss_that_returns_terms_is_their_sum():
    def terms(z1, z2):
        return {"first": barlow_twins_loss(z1, z2), "second": vicreg_loss(z1, z2)}

    found = check_loss(terms, DIM, NUM_PAIRS), check_loss(lambda z1, z2: sum(terms(z1, z2).values()), DIM, NUM_PAIRS)
    assert found[0].passed and found[0].rows == found[1].rows


def test_attraction_alone_has_no_growing_modes():
    h1, h2 = torch.randn(2, NUM_PAIRS, 7)
    report = check_loss(nn.MSELoss(), DIM, NUM_PAIRS, h1, h2)
    assert not report.passed and rows(report)["growing modes"].value.startswith("0 of 5")


def test_module_keeps_its_state_and_data_type():
    head = nn.Sequential(nn.Linear(DIM, 3), nn.BatchNorm1d(3))

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, z1, z2):
            return (self.head(z1) - self.head(z2)).square().mean()

    before = {name: value.clone() for name, value in head.state_dict().items()}
    check_loss(Headed(), DIM, NUM_PAIRS)
    for name, value in head.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


def test_ranks_are_not_checked_where_they_cannot_run(monkeypatch):
    def waits_on_one_rank(z1, z2):
        if dist.is_initialized() and dist.get_rank() == 0:
            dist.barrier()
        return vicreg_loss(z1, z2)

    monkeypatch.setattr(two_ranks, "_TIMEOUT", 2)
    found = rows(check_loss(waits_on_one_rank, DIM, NUM_PAIRS))["two ranks"]
    assert found.result == "not checked"
    # With an accelerator, new interpreters are started, to which a local function cannot be sent.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    found = rows(check_loss(waits_on_one_rank, DIM, NUM_PAIRS))["two ranks in JointEmbedding"]
    assert found.result == "not checked" and "define it in a module" in found.value


@pytest.mark.slow
def test_ranks_run_in_new_interpreters(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    found = rows(check_loss(vicreg_loss, DIM, NUM_PAIRS))
    assert found["two ranks"].result == "note" and found["two ranks in JointEmbedding"].result == "pass"


def test_invalid_arguments_raise_one_line():
    with pytest.raises(ValueError, match="num_pairs at least 2, got 5 and 1"):
        check_loss("vicreg", DIM, 1)
    with pytest.raises(ValueError, match="pass h1 and h2, or neither"):
        check_loss("vicreg", DIM, NUM_PAIRS, torch.zeros(12, 3))
    with pytest.raises(ValueError, match="loss must be one of"):
        check_loss("unknown", DIM, NUM_PAIRS)
