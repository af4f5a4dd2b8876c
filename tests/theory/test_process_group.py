"""Real processes share kernel fits and tangent kernels: all get what one process gets, or all get the same refusal."""

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    EmpiricalNTK,
    block_lanczos,
    linear_kernel,
    process_group,
    rbf_kernel,
    relu_ntk,
)
from stepwise_lightning.theory.process_group import one_process

RBF = partial(rbf_kernel, length_scale=2.0)
# Of about 130 views: all tiles fit one process, they fit when two share them, and they do not fit.
HELD, HELD_BY_TWO, STREAMED = 2**30, 50_000, 12_288


def pairs(n=65, seed=0):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(n, 6, dtype=torch.float64, generator=generator) * torch.linspace(2, 0.5, 6)
    return tuple(content + 0.3 * torch.randn(n, 6, dtype=torch.float64, generator=generator) for _ in range(2))


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(15, 4))


def fitted(n, kernel, max_bytes, dense):
    """Return what a fit leaves, and embeddings of other points than those of the fit."""
    block_lanczos._DENSE = 300 if dense else 0
    model = ContrastiveKernelPCA(kernel, min(4, n), max_bytes).fit(*pairs(n))
    points, start = pairs(7, seed=1)[0], torch.full((min(4, n),), 1e-3)
    embeddings = torch.cat(
        [model.transform(points), model.transform(points[:1]), model.transform_at(points, 1.0, start)]
    )
    block_lanczos._DENSE = 300
    return model.eigenvalues_, model.coefficients_, embeddings, model.residuals_ / model.eigenvalues_[0]


def everything():
    """Return tensors by name: fits by each route, of pairs that the ranks divide and that they do not."""
    results = {}
    for n, name in ((65, "rbf"), (65, "relu"), (64, "rbf"), (2, "relu"), (1, "rbf")):
        kernel = {"rbf": RBF, "relu": relu_ntk}[name]
        for max_bytes in (HELD, HELD_BY_TWO, STREAMED) if n == 65 else (HELD,):
            results[n, name, max_bytes] = fitted(n, kernel, max_bytes, dense=False)
        results[n, name, "dense"] = fitted(n, kernel, HELD, dense=True)
    x, y = pairs(9)
    kernel = EmpiricalNTK(network(), max_bytes=2**14)
    results["tangent kernel"] = kernel(x, x), kernel(x, y[:2]), kernel(x[:1], y), kernel(x[:1], x[:1])
    results["fit of a tangent kernel"] = fitted(9, kernel, HELD, dense=False)
    return results


class Spoilt:
    """An RBF kernel that from its third call on raises on one rank."""

    def __init__(self, rank, error):
        self.rank, self.error, self.calls = rank, error, count()

    def __call__(self, x, y):
        if next(self.calls) >= 2 and self.rank == 1:
            raise self.error
        return RBF(x, y)


def refusals(rank):
    """Return what each rank is told by name: its kind and its text."""
    (x1, x2), (y1, y2) = pairs(), pairs(seed=rank)
    tile = UserError("no such tile")
    uses = {
        "tile, held": lambda: ContrastiveKernelPCA(Spoilt(rank, tile), 2).fit(x1, x2),
        "tile, recomputed": lambda: ContrastiveKernelPCA(Spoilt(rank, tile), 2, STREAMED).fit(x1, x2),
        "bug": lambda: ContrastiveKernelPCA(Spoilt(rank, KeyError("a bug")), 2).fit(x1, x2),
        "views": lambda: ContrastiveKernelPCA(RBF, 2).fit(y1, y2),
        "number of pairs": lambda: ContrastiveKernelPCA(RBF, 2).fit(x1[rank:], x2[rank:]),
        "settings": lambda: ContrastiveKernelPCA(RBF, 2 + rank).fit(x1, x2),
        "kernels": lambda: ContrastiveKernelPCA(partial(rbf_kernel, length_scale=2.0 + rank), 2).fit(x1, x2),
        "networks": lambda: EmpiricalNTK(network(rank))(x1, x1),
        "inputs": lambda: EmpiricalNTK(network())(y1, y1),
        "modes": lambda: ContrastiveKernelPCA(linear_kernel, 2).fit(x1, -x1),
        "not finite": lambda: ContrastiveKernelPCA(RBF, 2).fit(x1, x2.index_fill(0, torch.tensor([rank]), torch.nan)),
    }  # fmt: skip
    told = {}
    for name, use in uses.items():
        try:
            use()
        except Exception as error:
            told[name] = type(error).__name__, str(error)
    return told


def held_values():
    """Return how many kernel values this rank holds of 130 views by each route, None where it holds none."""
    products = [
        block_lanczos.KernelOperator(RBF, torch.cat(pairs()), size, False) for size in (HELD, HELD_BY_TWO, STREAMED)
    ]
    return [None if each.held is None else sum(tile.numel() for _, _, tile in each.held) for each in products]


def alone(rank):
    """Return a model and a kernel that rank zero alone has made, and what it is told where it should have said so."""
    if rank:
        return None
    with one_process():
        made = fitted(64, RBF, HELD, dense=False), EmpiricalNTK(network())(pairs()[0], pairs()[1])
    process_group._TIMEOUT = timedelta(seconds=0.2)
    try:
        EmpiricalNTK(network())(*pairs())
    except UserError as error:
        return made, str(error)


def killed_in_a_fit():
    """Kill rank one in the middle of a fit."""
    dist.init_process_group("gloo")
    rank, calls = dist.get_rank(), count()

    def kernel(x, y):
        if next(calls) == 40 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return RBF(x, y)

    ContrastiveKernelPCA(kernel, 2, STREAMED, tolerance=1e-15).fit(*pairs())


def rank_results():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {"everything": everything(), "refusals": refusals(rank), "held": held_values(), "alone": alone(rank)}
    dist.barrier()  # rank zero keeps the store that the others still use
    return results


@pytest.fixture(scope="module")
def one():
    return everything()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, processes):
    """Return the results of each rank."""
    return processes.run_ranks(request.param, rank_results)


def test_every_rank_has_what_one_process_has(one, ranks):
    for rank in ranks:
        assert rank["everything"].keys() == one.keys()
        for name, expected in one.items():
            for actual, value in zip(rank["everything"][name], expected, strict=True):
                torch.testing.assert_close(
                    actual, value, rtol=0, atol=1e-12 * float(value.abs().max() + 1e-3), msg=name
                )


def test_all_ranks_have_the_same_bits(ranks):
    first, *others = (rank["everything"] for rank in ranks)
    assert all(
        torch.equal(a, b) for other in others for name in first for a, b in zip(first[name], other[name], strict=True)
    )


def test_a_refusal_on_one_rank_is_the_same_on_all(ranks):
    told = [rank["refusals"] for rank in ranks]
    for name, text in {
        "tile, held": "no such tile", "tile, recomputed": "no such tile", "modes": "no positive mode",
        "kernels": "the ranks have different kernels",
    }.items():  # fmt: skip
        assert {rank[name][0] for rank in told} == {"UserError"} and len({rank[name] for rank in told}) == 1
        assert text in told[0][name][1]
    for name in ("views", "number of pairs", "settings", "networks", "inputs", "not finite"):
        assert len({rank[name] for rank in told}) == 1
        assert f"{len(told)} ranks have called" in told[0][name][1] and "different arguments" in told[0][name][1]


def test_a_bug_on_one_rank_keeps_its_traceback_there_and_ends_the_others(ranks):
    for index, rank in enumerate(ranks):
        expected = ("KeyError", "'a bug'") if index == 1 else ("UserError", "a rank has failed: KeyError: 'a bug'")
        assert rank["refusals"]["bug"] == expected


def test_no_rank_holds_more_than_its_share(ranks):
    half = 130**2 / 2
    one = held_values()
    assert one == [130**2, None, None]  # so few that they are one tile
    held = [rank["held"] for rank in ranks]
    for shares in zip(*(values[:2] for values in held), strict=True):
        assert half < sum(shares) < 1.4 * half and max(shares) < 1.4 * half / len(held)
    assert all(values[2] is None for values in held)


def test_one_rank_can_compute_alone_and_is_told_if_it_does_not_say_so(one, ranks):
    (fit, kernel), told = ranks[0]["alone"]
    assert all(torch.equal(a, b) for a, b in zip(fit, one[64, "rbf", HELD], strict=True))
    assert torch.equal(kernel, EmpiricalNTK(network())(*pairs()))
    assert "\n" not in told and "has called EmpiricalNTK and waited" in told and "with one_process():" in told


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_rank_ends_the_others_with_one_line(num_ranks, processes):
    for rank, outcome in enumerate(processes.launch(killed_in_a_fit, ranks=num_ranks)):
        if rank == 1:
            assert outcome.status == -signal.SIGKILL
        else:
            assert outcome.status == 1
            (line,) = outcome.output.splitlines()
            assert line.startswith("another process of this run has ended or does not answer: look at what it")


@pytest.mark.slow
def test_the_program_in_the_documentation_runs_under_torchrun(tmp_path):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "clusters.md").read_text(encoding="utf-8")
    program = next(
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "fit_tr" in code
    )
    (tmp_path / "fit.py").write_text(program)
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "fit.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "machine.pt", weights_only=True)
    assert saved["coefficients"].shape == (4000, 10) and (saved["eigenvalues"] > 0).all()
