"""Printed lines of a run, and the commands summary and plot on its folder."""

import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
from matplotlib.image import imread
from tiny_runs import changed, stepwise, write_images

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.__main__ import main
from stepwise_lightning.callbacks import progress as report
from stepwise_lightning.plots import overlay_figure, run_figure

BOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "tiny"}}


def command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stepwise", *map(str, arguments)])
        main()


@pytest.fixture(scope="module")
def printed_run(tmp_path_factory, rendered_figures):
    """Train a run of twelve steps; return its folder, with a copy of the run, and the printed lines."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(report, "_MIN_SECONDS", 0.0)
        patch.setattr(report, "_MIN_SHARE", 0.0)
        changes = {"trainer.logger": BOARD, "trainer.max_steps": 12, "trainer.enable_progress_bar": True}
        with redirect_stdout(StringIO()) as output:
            stepwise("fit", config=changed(changes))
    shutil.copytree(folder / "runs/tiny/version_0", folder / "runs/tiny/version_1")
    return folder, output.getvalue().splitlines()


@pytest.fixture(autouse=True)
def here(printed_run, monkeypatch):
    monkeypatch.chdir(printed_run[0])


def test_run_prints_plan_progress_and_result(printed_run):
    first, second, seeds, third, *progress = printed_run[1]
    assert first == "BarlowTwins on images: 144 parameters in LinearEncoder"
    assert second == "12 steps of 4 pairs, learning rate 0.001, on cpu with 1 thread"
    assert seeds == "seeds: seed_everything 0, data.probe_seed 0" and third == "writes to runs/tiny/version_0"
    assert progress[0].startswith("step 1 of 12, ") and "left" in progress[0]
    end = dict(line.split(maxsplit=1) for line in progress[progress.index("") + 1 :])
    assert end["run"] == "runs/tiny/version_0, 12 steps" and end["watch"] == "tensorboard --logdir runs/tiny"
    assert end["found"] == "1 distinct step in C, 1 in the covariance"
    assert imread(end["picture"]).shape[0] > 300 and end["picture"] == "runs/tiny/version_0/trajectories.png"


def test_progress_lines_become_less_frequent(monkeypatch):
    clock = iter([0.0, *range(1, 2001)])
    monkeypatch.setattr(report.time, "monotonic", lambda: float(next(clock)))
    lines = []
    monkeypatch.setattr(
        report.LineProgress, "_line", lambda self, trainer, module, elapsed: lines.append(elapsed) or ""
    )
    progress = report.LineProgress()
    trainer = type("Trainer", (), {"global_step": 0})()
    progress.on_train_start(trainer, None)
    for _ in range(2000):
        progress.on_train_batch_end(trainer, None, None, None, 0)
    assert lines[:3] == [10, 20, 30] and lines[-1] - lines[-2] > 90 and len(lines) < 70


def test_messages_of_libraries_are_filtered(printed_run, caplog, recwarn):
    stepwise("fit", config=changed({}))
    assert not [text for text in caplog.messages if "Tip" in text or "TPU" in text or "Seed" in text]
    assert not [warning for warning in recwarn if "LeafSpec" in str(warning.message)]


def test_summary_is_a_table_of_runs_and_matrices(capsys):
    command("summary", "runs/tiny/version_0", "runs/tiny/version_1")
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "run" and "distinct steps" in head
    assert [row.split()[:2] for row in rows[::3]] == [
        ["runs/tiny/version_0", "cross_correlation"],
        ["runs/tiny/version_1", "cross_correlation"],
    ]


@pytest.mark.parametrize(
    ("runs", "ending"), [(["version_0"], "png"), (["version_0", "version_1", "version_0/"], "pdf")]
)
def test_plot_of_one_run_and_of_several(runs, ending, tmp_path, capsys):
    out = tmp_path / f"picture.{ending}"
    command("plot", *(f"runs/tiny/{run}" for run in runs), "--out", out, "--matrix", "covariance")
    assert out.read_bytes()[:4] in (b"\x89PNG", b"%PDF") and capsys.readouterr().out.strip() == str(out)
    if ending == "pdf":
        assert b"/Type3" not in out.read_bytes()


def test_overlaid_runs_have_one_color_each_and_a_legend():
    records = {name: SpectrumRecord.load(f"runs/tiny/version_{name}") for name in "01"}
    figure = overlay_figure(records, matrices=["covariance"])
    colours = [line.get_color() for line in figure.axes[1].lines]
    assert len(colours) == 6 and len(set(colours[:3])) == len(set(colours[3:])) == 1 and colours[0] != colours[3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1"]
    assert len(run_figure(records["0"]).axes) == 2 * 3


MISTAKES = {
    "no run": (["summary", "nowhere"], "no file 'nowhere': pass a spectrum.npz, or the folder"),
    "ending": (["plot", "runs/tiny/version_0", "--out=x.doc"], "must end in one of .png, .pdf, .svg"),
    "matrix": (["plot", "runs/tiny/version_0", "--matrix=C"], "no matrix 'C' in this record; choose from: cross_"),
    "no network": (["download", "cifar10"], "CIFAR-10 could not be downloaded and unpacked"),
    "nothing given": (["plot"], "the following arguments are required: RUN"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported_in_one_line(arguments, message, capsys, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    (line,) = text.strip().splitlines()
    assert line.startswith("stepwise") and message in line
