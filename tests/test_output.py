"""Output of the command line: narrow encodings, number of threads, errors of several processes."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from fresh_processes import stepwise as in_this_process
from tiny_runs import CONFIG, changed, refusal, stepwise, write_images

from stepwise_lightning.__main__ import main
from stepwise_lightning.commands import threads
from stepwise_lightning.commands.reporting import prepare_output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NARROW = pytest.mark.parametrize("encoding", ["ascii", "cp1252"])  # without "≈" and "λ"


def output_in(encoding, monkeypatch, function, *arguments, **options):
    """Call a function and return its output in a narrow encoding."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    with monkeypatch.context() as patch, suppress(SystemExit):
        patch.setenv("PYTHONIOENCODING", encoding)
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True))
        function(*arguments, **options)
    return output.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_training_prints_in_a_narrow_encoding(encoding, folder, monkeypatch):
    analytical = {"normalize": False, "center": True, "off_diagonal_weight": 1.0, "learning_rate": 0.02}
    config = changed({f"model.init_args.{name}": value for name, value in analytical.items()})
    config["trainer"] |= {"max_steps": 120, "enable_progress_bar": True}
    config["trainer"]["callbacks"][0]["init_args"] = {"center": True, "num_points": 5}
    config["trainer"]["callbacks"] += [{"class_path": "stepwise_lightning.ForecastLogger"}]
    text = output_in(encoding, monkeypatch, stepwise, "fit", "--forecast.cost=1", config=config)
    assert "modes learned, next at about step" in text and "found    1 distinct step in C" in text


@NARROW
@pytest.mark.parametrize("command", ["fit --help", "forecast --help", "summary --help", "--help"])
def test_help_prints_in_a_narrow_encoding(command, encoding, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stepwise", *command.split()])
    assert "usage: stepwise" in output_in(encoding, monkeypatch, main)


def test_processes_started_later_print_in_a_narrow_encoding(monkeypatch):
    for before, after in (("ascii", "ascii:replace"), ("", ":replace"), ("utf-8:strict", "utf-8:strict")):
        monkeypatch.setenv("PYTHONIOENCODING", before)
        prepare_output()
        assert os.environ["PYTHONIOENCODING"] == after


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads by default, and no explicit number."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_DEFAULT", 2)
    yield
    torch.set_num_threads(before)


def plan(capsys):
    return next(line for line in capsys.readouterr().out.splitlines() if " on cpu with " in line)


def test_small_network_trains_in_one_thread(two_threads, folder, capsys, monkeypatch):
    stepwise("fit")
    assert plan(capsys).endswith("on cpu with 1 thread")
    assert torch.get_num_threads() == 2  # in a program that continues after the command
    monkeypatch.setattr(threads, "_SMALL", 100)
    stepwise("fit")
    assert plan(capsys).endswith("on cpu with 2 threads")


@pytest.mark.parametrize("explicit", ["environment", "torch"])
def test_explicit_number_of_threads_is_kept(explicit, two_threads, folder, capsys, monkeypatch):
    if explicit == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    else:
        torch.set_num_threads(3)
    stepwise("fit")
    assert plan(capsys).endswith("on cpu with 2 threads" if explicit == "environment" else "on cpu with 3 threads")


MISTAKES = {
    "unknown command": (["fitt"], "unknown command 'fitt'; choose from: fit, validate"),
    "unknown command of another kind": (["--configuration"], "unknown command '--configuration'"),
    "unknown configuration": (["fit", "--config", "barlow"], "no configuration 'barlow': give a file, or one"),
    "no arguments": (["fit"], "give --config, a file or one of barlow_twins_cifar10"),
    "no arguments of an evaluation": (["validate"], "give --config, a file or one of barlow_twins_cifar10"),
    "no model": (["fit", "--trainer.max_steps=3"], "no model: give --config, a file or one of barlow_twins_cifar10"),
    "steps below the minimum": (["fit", "--config=linear_photos", "--trainer.log_every_n_steps=-1"], "at least 0, got"),
    "initials": (["fit", "--config=linear_photos", "--model.lr=1"], "'lr' is not accepted; did you mean 'learning_"),
    "other initials": (["fit", "--config=vicreg_photos", "--model.wd=1"], "did you mean 'weight_decay'?"),
    "last initials": (["fit", "--config=vicreg_photos", "--data.bs=1"], "did you mean 'global_batch_size'?"),
    "in another section": (["fit", "--config=linear_photos", "--trainer.lr=1"], "did you mean --model.learning_rate"),
    "a word": (["fit", "--config=linear_photos", "--trainer.epochs=1"], "did you mean 'max_epochs'?"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_has_exit_status_2_and_a_remedy(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stepwise", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in line


TWICE = {
    "parser": ["--model.lr=1"],
    "configuration": pytest.param(["--trainer.log_every_n_steps=-1"], marks=pytest.mark.slow),
    "data": ["--data.data=missing"],
}
OFF = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]


def test_options_switch_off_callbacks_of_the_configuration(folder):
    names = ["lightning.pytorch.callbacks.TQDMProgressBar", "stepwise_lightning.LastCheckpoint"]
    callbacks = [{"class_path": name} for name in (*names, "stepwise_lightning.SpectrumLogger")]
    stepwise("fit", *OFF, config=changed({"trainer.callbacks": callbacks}))
    assert list(folder.rglob("steps.json")) and not list(folder.rglob("*.ckpt"))


MISFITS = {
    "num_probe_pairs=9": "num_probe_pairs 9 is more than the 2 held-out images",
    "global_batch_size=30": "global_batch_size 30 is larger than the 18 training images",
    "data=missing": "data set 'missing' is neither",
}


@pytest.mark.parametrize(("option", "message"), MISFITS.items(), ids=MISFITS)
def test_setting_that_does_not_fit_the_data_is_refused_before_the_run_has_a_folder(option, message, folder, capsys):
    assert message in refusal(capsys, "fit", f"--data.{option}")
    assert not Path("runs").exists()


def test_small_folder_trains_without_probe_pairs(folder):
    config = changed({"data.init_args.num_probe_pairs": 9, "trainer.callbacks.0.init_args": {"probe": "batch"}})
    stepwise("fit", config=config)
    assert list(folder.rglob("steps.json"))


def test_result_without_a_learned_mode(folder, capsys):
    analytical = {"normalize": False, "center": True, "off_diagonal_weight": 1.0, "learning_rate": 1e-4}
    config = changed({f"model.init_args.{name}": value for name, value in analytical.items()})
    config["trainer"]["max_steps"] = 12
    config["trainer"]["callbacks"] += [{"class_path": "stepwise_lightning.ForecastLogger"}]
    stepwise("fit", "--forecast.cost=1", config=config)
    assert "found    no mode learned yet in C: the largest eigenvalue is" in capsys.readouterr().out


@pytest.mark.parametrize("options", TWICE.values(), ids=TWICE)
def test_two_processes_report_an_error_once(options, processes, folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder))
    Path("mine.yaml").write_text(yaml.safe_dump(CONFIG))
    outcomes = processes.launch(in_this_process, "fit", "--config=mine.yaml", *options, ranks=2)
    assert len({outcome.status for outcome in outcomes}) == 1 and outcomes[0].status in (1, 2)
    assert sum("error: " in outcome.output for outcome in outcomes) == 1


def test_one_process_reports_an_error_every_time(folder, capsys):
    assert refusal(capsys, "fit", "--model.lr=1") == refusal(capsys, "fit", "--model.lr=1")
