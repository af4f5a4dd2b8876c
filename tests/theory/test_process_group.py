"""Kernel fits and tangent kernels in several processes match one process; errors are raised on all ranks."""

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
# max_bytes for 130 views: the kernel fits in one process, in two processes, in neither.
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
    """Return the fitted attributes and embeddings of held-out points."""
    block_lanczos._DENSE = 300 if dense else 0
    model = ContrastiveKernelPCA(kernel, min(4, n), max_bytes).fit(*pairs(n))
    points, start = pairs(7, seed=1)[0], torch.full((min(4, n),), 1e-3)
    embeddings = torch.cat(
        [model.transform(points), model.transform(points[:1]), model.transform_at(points, 1.0, start)]
    )
    block_lanczos._DENSE = 300
    return model.eigenvalues_, model.coefficients_, embeddings, model.residuals_ / model.eigenvalues_[0]


def all_results():
    """Return tensors by name: fits by each route, for numbers of pairs with and without a remainder."""
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


class FailingKernel:
    """RBF kernel that raises on rank one from its third call."""

    def __init__(self, rank, error):
        self.rank, self.error, self.calls = rank, error, count()

    def __call__(self, x, y):
        if next(self.calls) >= 2 and self.rank == 1:
            raise self.error
        return RBF(x, y)


def errors(rank):
    """Return type and message of each error on this rank, by name."""
    (x1, x2), (y1, y2) = pairs(), pairs(seed=rank)
    tile = UserError("no such tile")
    calls = {
        "tile, held": lambda: ContrastiveKernelPCA(FailingKernel(rank, tile), 2).fit(x1, x2),
        "tile, recomputed": lambda: ContrastiveKernelPCA(FailingKernel(rank, tile), 2, STREAMED).fit(x1, x2),
        "bug": lambda: ContrastiveKernelPCA(FailingKernel(rank, KeyError("a bug")), 2).fit(x1, x2),
        "views": lambda: ContrastiveKernelPCA(RBF, 2).fit(y1, y2),
        "number of pairs": lambda: ContrastiveKernelPCA(RBF, 2).fit(x1[rank:], x2[rank:]),
        "settings": lambda: ContrastiveKernelPCA(RBF, 2 + rank).fit(x1, x2),
        "kernels": lambda: ContrastiveKernelPCA(partial(rbf_kernel, length_scale=2.0 + rank), 2).fit(x1, x2),
        "networks": lambda: EmpiricalNTK(network(rank))(x1, x1),
        "inputs": lambda: EmpiricalNTK(network())(y1, y1),
        "modes": lambda: ContrastiveKernelPCA(linear_kernel, 2).fit(x1, -x1),
        "not finite": lambda: ContrastiveKernelPCA(RBF, 2).fit(x1, x2.index_fill(0, torch.tensor([rank]), torch.nan)),
    }  # fmt: skip
    raised = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            raised[name] = type(error).__name__, str(error)
    return raised


def num_held_values():
    """Return the number of kernel values that this rank stores of 130 views by each route, or None."""
    products = [
        block_lanczos.KernelOperator(RBF, torch.cat(pairs()), size, False) for size in (HELD, HELD_BY_TWO, STREAMED)
    ]
    return [None if each.tiles is None else sum(tile.numel() for _, _, tile in each.tiles) for each in products]


def single_rank_call(rank):
    """Return a fit and a kernel from one_process on rank zero, and the error of the same call outside it."""
    if rank:
        return None
    with one_process():
        results = fitted(64, RBF, HELD, dense=False), EmpiricalNTK(network())(pairs()[0], pairs()[1])
    process_group._TIMEOUT = timedelta(seconds=0.2)
    try:
        EmpiricalNTK(network())(*pairs())
    except UserError as error:
        return results, str(error)


def kill_rank_during_fit():
    """Kill rank one during a fit."""
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
    results = {
        "results": all_results(),
        "errors": errors(rank),
        "held": num_held_values(),
        "single rank": single_rank_call(rank),
    }
    dist.barrier()  # rank zero serves the store until all ranks are done
    return results


@pytest.fixture(scope="module")
def one():
    return all_results()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, processes):
    """Return the results of each rank."""
    return processes.run_ranks(request.param, rank_results)


def test_every_rank_matches_one_process(one, ranks):
    for rank in ranks:
        assert rank["results"].keys() == one.keys()
        for name, expected in one.items():
            for actual, value in zip(rank["results"][name], expected, strict=True):
                torch.testing.assert_close(
                    actual, value, rtol=0, atol=1e-12 * float(value.abs().max() + 1e-3), msg=name
                )


@pytest.mark.parametrize(
    ("config", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu"), ("meta:nccl2", "meta")]
)
def test_values_move_to_a_device_of_the_back_end(config, device, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    assert process_group._communicable(torch.ones(2)).device.type == device


def test_results_are_bitwise_equal_on_all_ranks(ranks):
    first, *others = (rank["results"] for rank in ranks)
    assert all(
        torch.equal(a, b) for other in others for name in first for a, b in zip(first[name], other[name], strict=True)
    )


def test_error_on_one_rank_is_raised_on_all(ranks):
    raised = [rank["errors"] for rank in ranks]
    for name, text in {
        "tile, held": "no such tile", "tile, recomputed": "no such tile", "modes": "no positive mode",
        "kernels": "the ranks have different kernels",
    }.items():  # fmt: skip
        assert {rank[name][0] for rank in raised} == {"UserError"} and len({rank[name] for rank in raised}) == 1
        assert text in raised[0][name][1]
    for name in ("views", "number of pairs", "settings", "networks", "inputs", "not finite"):
        assert len({rank[name] for rank in raised}) == 1
        assert f"{len(raised)} ranks called" in raised[0][name][1] and "different arguments" in raised[0][name][1]


def test_unexpected_error_keeps_its_type_and_ends_the_other_ranks(ranks):
    for index, rank in enumerate(ranks):
        expected = (
            ("KeyError", "'a bug'")
            if index == 1
            else ("UserError", "an error was raised on another rank: KeyError: 'a bug'")
        )
        assert rank["errors"]["bug"] == expected


def test_ranks_store_equal_parts_of_the_kernel(ranks):
    half = 130**2 / 2
    one = num_held_values()
    assert one == [130**2, None, None]  # one tile
    held = [rank["held"] for rank in ranks]
    for shares in zip(*(values[:2] for values in held), strict=True):
        assert half < sum(shares) < 1.4 * half and max(shares) < 1.4 * half / len(held)
    assert all(values[2] is None for values in held)


def test_one_process_computes_on_one_rank_and_its_absence_times_out(one, ranks):
    (fit, kernel), message = ranks[0]["single rank"]
    assert all(torch.equal(a, b) for a, b in zip(fit, one[64, "rbf", HELD], strict=True))
    assert torch.equal(kernel, EmpiricalNTK(network())(*pairs()))
    assert "\n" not in message and "called EmpiricalNTK and waited" in message and "with one_process():" in message


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_rank_ends_the_others_with_one_line(num_ranks, processes):
    for rank, outcome in enumerate(processes.launch(kill_rank_during_fit, ranks=num_ranks)):
        if rank == 1:
            assert outcome.status == -signal.SIGKILL
        else:
            assert outcome.status == 1
            (line,) = outcome.output.splitlines()
            assert line.startswith("another process of this run has ended or does not answer: read its output")


@pytest.mark.slow
def test_documented_program_runs_under_torchrun(tmp_path):
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
