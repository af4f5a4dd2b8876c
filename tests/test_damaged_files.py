"""Damaged files of a run are read correctly or refused in one line."""

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny_sets import Touch, damaged

from reproduce.claims import Claim, read_claim
from reproduce.figure import Outcome, finished_claims, print_verdict, write_outputs
from reproduce.networks.runs import Run
from reproduce.networks.training import PROFILES
from reproduce.options import new_parser
from reproduce.report import write_report
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.commands import lightning_cli
from stepwise_lightning.theory import ContrastiveKernelPCA, linear_kernel

# multiplies the number of cases; the larger value is slow
FEW_AND_MANY = pytest.mark.parametrize("scale", [1, pytest.param(40, marks=pytest.mark.slow)])


def check_damaged(path: Path, read: Callable[[], object], cases: int, message: str) -> None:
    """Damage a file many times; reading it must succeed, or raise a ValueError of one line."""
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    read()
    for _ in range(cases):
        path.write_bytes(damaged(whole, draw))
        try:
            read()
        except ValueError as refusal:
            assert re.fullmatch(message, str(refusal)), str(refusal)
            refused += 1
    for content in (b"", b"\0", whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read()
    path.write_bytes(whole)
    read()
    assert refused > cases / 10


def _train(command: list[str]) -> int:
    """Run the training command in this process, which has imported everything."""
    lightning_cli.main(command[command.index("fit") :])
    return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Train a network of the figures for two steps."""
    out = tmp_path_factory.mktemp("results")
    options = ["--out", str(out), "--profile", "smoke", "--data", "photos"]
    run = Run("barlow_twins", "small", 0, new_parser("runs", "", PROFILES).parse_args(options))
    settings = run.settings() | {"trainer.max_steps": 2, "trainer.log_every_n_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "settings", lambda run: settings)
        patch.setattr(Run, "_begin", lambda run, command, *_: SimpleNamespace(wait=partial(_train, command)))
        run.train()
        assert run.is_finished() and len(run.record) == 3
        yield run


@FEW_AND_MANY
def test_damaged_spectra(run, scale):
    file = run.directory / "spectrum.npz"
    names = SpectrumRecord.load(file).arrays().keys()
    assert (
        {"step", "time", "loss", "cross_correlation", "covariance/rankme"}
        <= names
        == SpectrumRecord.load(str(run.directory)).arrays().keys()
    )
    check_damaged(
        file,
        lambda: SpectrumRecord.load(file),
        75 * scale,
        r"'[^\n]*spectrum\.npz' (cannot be read as|holds no) spectra[^\n]*",
    )


def test_other_files_are_refused_as_spectra(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no file '.*spectrum.npz': pass a spectrum.npz, or the folder of a finished run"
    ):
        SpectrumRecord.load(tmp_path)
    three = np.arange(3)
    for arrays in (
        {"step": three},
        {"step": three, "time": three, "loss": np.arange(2)},
        {"step": 1, "time": 1, "loss": 1},
        {"step": three, "time": three, "loss": np.array(["a", "b", "c"])},
    ):
        np.savez(tmp_path / "spectrum.npz", **arrays)
        with pytest.raises(ValueError, match="holds no spectra: expected step, time, loss"):
            SpectrumRecord.load(tmp_path)
    np.save(tmp_path / "spectrum.npy", three)
    with pytest.raises(ValueError, match="cannot be read as spectra"):
        SpectrumRecord.load(tmp_path / "spectrum.npy")


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    np.savez(tmp_path / "spectrum.npz", step=np.arange(2), time=np.array([Touch(marker)] * 2, dtype=object))
    with pytest.raises(ValueError, match="cannot be read as spectra .ValueError: Object arrays cannot be loaded"):
        SpectrumRecord.load(tmp_path)
    np.save(tmp_path / "spectrum.npz.npy", np.array([Touch(marker)], dtype=object))
    with pytest.raises(ValueError, match="cannot be read as spectra"):
        SpectrumRecord.load(tmp_path / "spectrum.npz.npy")
    for saved in (Touch(marker), {"eigenvalues": Touch(marker)}):
        torch.save(saved, tmp_path / "model.pt")
        with pytest.raises(
            ValueError, match="cannot load a ContrastiveKernelPCA from .*UnpicklingError.*save it again"
        ):
            ContrastiveKernelPCA.load(tmp_path / "model.pt", linear_kernel)
    assert not marker.exists()
    with np.load(tmp_path / "spectrum.npz", allow_pickle=True) as trusted:
        assert len(trusted["time"]) == 2 and marker.exists()  # unpickling does run it


@FEW_AND_MANY
def test_damaged_kernel_model(scale, tmp_path):
    path = tmp_path / "model.pt"
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ContrastiveKernelPCA(linear_kernel, 2).fit(x, x + 0.1).save(path)
    load = partial(ContrastiveKernelPCA.load, path, linear_kernel)
    message = (
        r"(cannot load a ContrastiveKernelPCA from '[^\n]*model\.pt' \([^\n]*\)|"
        r"'[^\n]*model\.pt' does not hold a fitted ContrastiveKernelPCA): save it again"
    )
    check_damaged(path, load, 150 * scale, message)
    fitted = torch.load(path, weights_only=True)
    for name, value in fitted.items():
        integers = [value.long()] if name != "views" else [value.to(torch.complex128)]  # which views may be
        for other in (None, value[:-1], value[None], value * float("nan"), *integers):
            torch.save(fitted | {name: other}, path)
            with pytest.raises(ValueError, match=message):
                load()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load()


class _success_or_refusal:
    """Accept success, or a ValueError with this message."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: Exception | None, _: object) -> bool:
        return kind is not None and issubclass(kind, ValueError) and re.fullmatch(self.message, str(error)) is not None


@FEW_AND_MANY
def test_damaged_configuration_and_weights(run, scale):
    def built() -> None:
        Run(run.loss, run.variant, run.seed, run.options).encoder(trained=True)  # without cached files

    message = r"(config\.yaml|the checkpoint) in '[^\n]*' cannot be used \([^\n]*\): train again, without --resume"
    (checkpoint,) = (run.directory / "checkpoints").glob("*.ckpt")
    check_damaged(checkpoint, built, 10 * scale, message)
    whole, draw = (run.directory / "config.yaml").read_bytes(), random.Random(0)
    for content in [b"", b"\xff", b"model: 7", *(damaged(whole, draw) for _ in range(3 * scale))]:
        (run.directory / "config.yaml").write_bytes(content)
        with _success_or_refusal(message):
            built()
    (run.directory / "config.yaml").write_bytes(whole)
    built()


@FEW_AND_MANY
def test_damaged_run_does_not_count_as_finished(run, scale, capsys):
    draw = random.Random(0)
    for path in (run.directory.parent / "settings.json", run.directory / "spectrum.npz"):
        whole = path.read_bytes()
        for content in [b"", *(damaged(whole, draw) for _ in range(20 * scale))]:
            path.write_bytes(content)
            if run.is_finished():
                assert content == whole or path.suffix == ".npz"  # some bytes of a zip file have no meaning
            else:
                assert re.fullmatch(r"warning: [^\n]* training [^\n]* again\n", capsys.readouterr().err)
        path.write_bytes(whole)
    assert run.is_finished()


CLAIM = {"name": "n", "description": "d", "measured": 1.5, "relation": "<=", "bound": 2}


@pytest.mark.parametrize(
    "change", [{"measured": "x"}, {"bound": None}, {"relation": "<"}, {"relation": []}, {"name": ...}]
)
def test_damaged_claims(change):
    assert read_claim(CLAIM | {"holds": False}) == Claim("n", "d", 1.5, "<=", 2.0)  # recomputed from the numbers
    changed = {key: value for key, value in (CLAIM | change).items() if value is not ...}
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_claim(changed)


@FEW_AND_MANY
def test_damaged_claims_and_report(scale, tmp_path, capsys):
    identity = {"data_set": "photos", "seeds": [0, 1], "options": {"profile": "smoke"}, "version": "0.1.0"}
    facts = {
        "name": "figure",
        "title": "Title",
        "paper": "Fig. 1",
        **identity,
        "settings": {},
        "runs": [],
        "seconds": 3.5,
    }
    claims = [Claim("a", "it is small", 0.5, "<=", 1.0), Claim("b", "it is large", 7, ">=", 6)]
    write_outputs(tmp_path / "figure", Outcome(Figure(), ["x"], [[1]], claims, [{"seed": 0}]), facts)
    path, draw, outcomes = tmp_path / "figure" / "claims.json", random.Random(0), set()
    whole = path.read_bytes()
    assert finished_claims(path.parent, identity) == claims
    for content in [
        b"",
        b"[]",
        b"{}",
        b"7",
        b"null",
        b"[" * 100_000,
        *(damaged(whole, draw) for _ in range(150 * scale)),
    ]:
        path.write_bytes(content)
        page = write_report(tmp_path, ["figure", "kernel_pca"]).read_text(encoding="utf-8")
        assert "kernel_pca</td><td class='fails'>missing" in page
        kept = finished_claims(path.parent, identity)
        assert kept is None or print_verdict(path.parent, kept) in (0, 1)
        outcomes.add(("claims.json cannot be read" in page, kept is None))
        assert re.fullmatch(r"(warning: [^\n]*; computing the figure again\n)?", capsys.readouterr().err)
    assert {(True, True), (False, False)} <= outcomes
