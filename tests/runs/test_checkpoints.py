"""Checkpoints are read as data, and refused in one line if they do not fit."""

import http.server
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_runs import changed, refusal, stepwise, write_images
from tiny_sets import Touch

from stepwise_lightning.runs import AtomicCheckpointIO

SLOW = pytest.mark.slow
# Lightning warns where a run is resumed in a new folder, as here.
NEW_FOLDER = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps and return the path of the checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stepwise("fit")
    (checkpoint,) = folder.glob("runs/*/version_0/checkpoints/*.ckpt")
    return checkpoint


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a new folder with the images."""
    (tmp_path / "images").symlink_to(trained.parents[4] / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def marker(here: Path) -> Iterator[Path]:
    """Return the path of a file that unpickling would create, and fail if it exists after the test."""
    proof = here / "proof"
    pickle.loads(pickle.dumps(Touch(proof)))
    assert proof.exists()
    yield here / "marker"
    assert not (here / "marker").exists()


@pytest.fixture
def malicious(trained: Path, here: Path, marker: Path) -> Path:
    """Return a valid checkpoint with an object that runs code when it is unpickled."""
    path = here / "malicious.ckpt"
    torch.save(torch.load(trained, weights_only=True) | {"extra": Touch(marker)}, path)
    return path


@pytest.fixture
def address(malicious: Path) -> Iterator[str]:
    """Serve the malicious checkpoint on a local HTTP server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(malicious.parent))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{malicious.name}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", ["fit", "test", pytest.param("validate", marks=SLOW)])
def test_malicious_checkpoint_is_refused_and_not_run(command, malicious, capsys):
    assert "it contains more than tensors and plain values, namely" in refusal(
        capsys, command, f"--ckpt_path={malicious}"
    )


@pytest.mark.parametrize("command", [pytest.param("fit", marks=SLOW), "validate"])
def test_malicious_checkpoint_is_refused_despite_environment_variable(command, malicious, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for path in (malicious, malicious.as_uri()):
        assert "it contains more than tensors and plain" in refusal(capsys, command, f"--ckpt_path={path}")


def test_malicious_checkpoint_from_a_server_is_refused(address, here, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    assert "it contains more than tensors and plain values" in refusal(capsys, "validate", f"--ckpt_path={address}")
    assert list((here / "torch").rglob("*.ckpt"))  # it was downloaded


def test_weights_only_false_is_refused(malicious, capsys):
    for path in (malicious, malicious.as_uri()):
        line = refusal(capsys, "validate", f"--ckpt_path={path}", "--weights_only=false")
        assert "weights_only=false would let a checkpoint run code" in line


@NEW_FOLDER
def test_classes_named_in_a_checkpoint_are_not_imported(trained, here, marker, monkeypatch):
    """Lightning builds the model from the hyperparameters in the checkpoint."""
    (here / "planted.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nModel = 1\n")
    monkeypatch.syspath_prepend(here)
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hyper_parameters"] |= {"_class_path": "planted.Model", "_instantiator": "planted.Model"}
    torch.save(checkpoint, "planted.ckpt")
    for command in ("fit", "validate"):
        stepwise(command, "--ckpt_path=planted.ckpt", config=changed({"trainer.max_steps": 3}))


def test_resume_with_other_hyperparameters_is_refused(trained, here, capsys):
    line = refusal(capsys, "fit", f"--ckpt_path={trained}", "--model.init_args.learning_rate=0.123")
    assert "the checkpoint was trained with learning_rate=0.001, not 0.123" in line


@NEW_FOLDER
def test_checkpoint_is_resumed_and_evaluated(trained, here):
    stepwise("fit", f"--ckpt_path={trained}", config=changed({"trainer.max_steps": 5}))
    (checkpoint,) = here.glob("runs/*/version_0/checkpoints/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    before = sorted(here.rglob("*"))
    stepwise("validate", f"--ckpt_path={checkpoint}", "--weights_only=true")
    assert sorted(here.rglob("*")) == before  # an evaluation writes nothing


def test_hyperparameter_table_has_loss_encoder_scale_and_rates(here):
    board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs"}}
    stepwise("fit", config=changed({"trainer.logger": board}))
    events = EventAccumulator(str(here / "runs/lightning_logs/version_0")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["loss"].string_value == "BarlowTwins" and settings["encoder"].string_value == "LinearEncoder"
    assert settings["learning_rate"].number_value == settings["init_std"].number_value == 1e-3
    columns = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    tags = [info.name.tag for info in HParamsPluginData.FromString(columns).experiment.metric_infos]
    assert set(tags) <= set(events.Tags()["scalars"]) | {"steps/num_distinct"}  # logged after more than two steps


def _without(key: str) -> Any:
    return lambda checkpoint: {name: value for name, value in checkpoint.items() if name != key}


ALTERED = {
    "empty": lambda _: {},
    "a list": lambda _: [1, 2],
    "a tensor": lambda _: torch.ones(2),
    "no weights": _without("state_dict"),
    "no version": _without("pytorch-lightning_version"),
    "weights of another kind": lambda checkpoint: checkpoint | {"state_dict": 7},
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_incomplete_checkpoint_is_refused(alter, trained, here):
    torch.save(alter(torch.load(trained, weights_only=True)), "altered.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint cannot be restored \(.*\): is altered.ckpt a complete"):
        AtomicCheckpointIO().load_checkpoint("altered.ckpt", weights_only=True)


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
@pytest.mark.parametrize("command", [pytest.param("fit", marks=SLOW), pytest.param("validate", marks=SLOW)])
def test_command_refuses_incomplete_checkpoint(command, alter, trained, here, capsys):
    torch.save(alter(torch.load(trained, weights_only=True)), "altered.ckpt")
    assert "checkpoint" in refusal(capsys, command, "--ckpt_path=altered.ckpt")


def test_checkpoint_of_another_width_is_refused(trained, here, capsys):
    line = refusal(capsys, "validate", f"--ckpt_path={trained}", "--model.init_args.encoder.init_args.out_features=5")
    assert "size mismatch for encoder.weight" in line and len(line) < 500
