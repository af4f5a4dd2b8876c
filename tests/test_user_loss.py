"""JointEmbedding with a loss of the user: from Python and YAML, over ranks, resumed, and refused in one line."""

import csv
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from fresh_processes import stepwise
from test_modules import Sharded, encoder, fit, pairs
from tiny_runs import changed, refusal, write_images
from yaml import safe_dump

from stepwise_lightning import BarlowTwins, JointEmbedding, load_encoder
from stepwise_lightning.callbacks.tensorboard import PrimaryMatrix
from stepwise_lightning.spectrum import MATRICES

MY_LOSSES = '''
import torch


def spectral(z1, z2):
    return (z1 @ z2.T).square().mean() - 2 * (z1 * z2).sum(1).mean()


class Scaled(torch.nn.Module):
    """A trained scale, random directions, and named terms."""

    def __init__(self, weight: float = 1.0, directions: int = 4):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.weight, self.directions = weight, directions

    def forward(self, z1, z2):
        a = torch.randn(z1.shape[1], self.directions, dtype=z1.dtype)
        spread = ((self.scale * z1 @ a).square().mean() - 1).square()
        return {"alignment": (z1 - z2).square().mean(), "spread": self.weight * spread}
'''


@pytest.fixture(scope="module")
def my_losses(tmp_path_factory):
    """Return the module my_losses of a user, and leave its folder on the path."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_losses.py").write_text(MY_LOSSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import my_losses

        yield my_losses
    del sys.modules["my_losses"]


def trained(directory, loss, steps=6, **trainer):
    L.seed_everything(5, verbose=False)
    module = JointEmbedding(encoder().double(), learning_rate=0.02, momentum=0.9, loss=loss)
    fit(module, directory, steps, loader=Sharded(), use_distributed_sampler=False, **trainer)
    return module.state_dict()


def trained_in_ddp(directory, folder):
    sys.path.insert(0, folder)
    from my_losses import Scaled

    class OtherState(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            torch.manual_seed(trainer.global_rank + trainer.global_step)  # ranks with different random states

    return trained(directory, Scaled(), devices=2, strategy="ddp", callbacks=[OtherState()])


def test_two_ranks_equal_one_process_with_a_trained_random_loss(my_losses, processes, tmp_path):
    one = trained(tmp_path, my_losses.Scaled())
    assert abs(one["loss_function.scale"] - 0.5) > 0.01
    for two in processes.run_ranks(2, trained_in_ddp, tmp_path, str(Path(my_losses.__file__).parent)):
        assert two.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-12, atol=1e-14)


def test_random_numbers_of_the_loss_depend_on_seed_and_step_only(my_losses, monkeypatch):
    module, z = JointEmbedding(encoder(), 0.1, loss=my_losses.Scaled()), torch.randn(2, 8, 3)
    state = torch.get_rng_state()
    first = module.loss(*z)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(module.loss(*z), first)
    monkeypatch.setenv("PL_GLOBAL_SEED", "77")
    assert not torch.equal(module.loss(*z), first)
    monkeypatch.undo()
    monkeypatch.setattr(JointEmbedding, "global_step", 1)
    assert not torch.equal(module.loss(*z), first)


CONFIG = changed(
    {
        "model.class_path": "stepwise_lightning.JointEmbedding",
        "model.init_args.loss": {"class_path": "my_losses.Scaled", "init_args": {"weight": 2.0}},
        "model.init_args.driven_matrix": "covariance",
        "trainer.log_every_n_steps": 1,
    }
)


def run(processes, config, *options):
    Path("mine.yaml").write_text(safe_dump(config))
    (outcome,) = processes.launch(stepwise, "fit", "--config=mine.yaml", *options)
    assert outcome.status == 0, outcome.output
    return outcome.output


def test_session_from_a_folder_with_a_loss_and_a_configuration(my_losses, processes, monkeypatch, tmp_path):
    """Train, resume bit-identically, and load; my_losses.py is found in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    Path("my_losses.py").write_text(MY_LOSSES)
    whole = run(processes, CONFIG, "--trainer.max_steps=4")
    assert "JointEmbedding on images" in whole
    run(processes, CONFIG)
    run(processes, CONFIG, "--trainer.max_steps=4", "--ckpt_path=last")
    paths = [f"runs/lightning_logs/version_{number}/checkpoints/last.ckpt" for number in (0, 1)]
    whole, resumed = (torch.load(path, weights_only=True) for path in paths)
    assert whole["global_step"] == resumed["global_step"] == 4
    assert whole["state_dict"]["loss_function.scale"] != 0.5
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    hparams = resumed["hyper_parameters"]
    assert hparams["loss"] == {"class_path": "my_losses.Scaled", "init_args": {"weight": 2.0, "directions": 4}}
    with Path("runs/lightning_logs/version_0/metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["train/loss"])
    terms = float(row["train/alignment"]) + float(row["train/spread"])
    assert terms == pytest.approx(float(row["train/loss"]), rel=1e-5)
    module = JointEmbedding.load_from_checkpoint(paths[0])
    assert module.loss_function.weight == 2.0 and module.loss_function.scale != 0.5
    assert torch.equal(load_encoder(paths[0]).weight, module.encoder.weight)


def test_function_of_a_configuration_is_saved_by_its_path_and_unknown_paths_are_refused(
    my_losses, processes, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    Path("my_losses.py").write_text(MY_LOSSES)
    model = CONFIG["model"]
    config = CONFIG | {"model": model | {"init_args": model["init_args"] | {"loss": "my_losses.spectral"}}}
    run(processes, config)
    run(processes, config, "--trainer.max_steps=3", "--ckpt_path=last")
    path = "runs/lightning_logs/version_0/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["hyper_parameters"]["loss"] == "my_losses.spectral"
    assert JointEmbedding.load_from_checkpoint(path).loss_function is my_losses.spectral
    for loss, reason in (("my_losses.spectrum", "has no attribute 'spectrum'"), ("mine.it", "No module named 'mine'")):
        line = refusal(capsys, "fit", f"--model.loss={loss}", config=config)
        assert f"{reason}; give the dotted path of a function loss(z1, z2), or class_path" in line
    line = refusal(capsys, "fit", "--model.driven_matrix=C", config=config)
    assert "driven_matrix must be one of cross_correlation, covariance, " in line and line.endswith("got 'C'")


def with_labels(z1, z2, labels):
    return z1.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "JointEmbedding needs a loss: give loss, a function of both views' embeddings z1 and z2"),
        ({"loss": "vicreg"}, "must be a function of both views' embeddings z1 and z2, got 'vicreg'"),
        ({"loss": torch.nn.MSELoss}, "got the class MSELoss: give an object of it"),
        ({"loss": with_labels}, r"test_user_loss.with_labels\(z1, z2, labels\) does not .*LightningModule of its own"),
        ({"loss": lambda z: z.sum()}, r"<lambda>\(z\) does not accept this \(too many positional arguments\)"),
        ({"loss": torch.nn.Identity()}, r"Identity\(input: .* does not accept this"),
        ({"loss": torch.nn.MSELoss(), "driven_matrix": "C"}, "driven_matrix must be one of .*, got 'C'"),
    ],
)  # fmt: skip
def test_losses_with_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        JointEmbedding(encoder(), 0.1, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda a, b: (a * b).sum(1),
            r"must return a scalar .* got a tensor of shape \(8,\) for 'loss': take its mean",
        ),
        (lambda a, b: {"similarity": (a * b).sum(1)}, r"got a tensor of shape \(8,\) for 'similarity'"),
        (
            lambda a, b: (a.sum(), b.sum()),
            r"must return a scalar tensor, or a dictionary of them, got a tuple for 'loss'",
        ),
        (lambda a, b: 1.0, r"must return a scalar tensor, or a dictionary of them, got 1.0 for 'loss'"),
        (lambda a, b: {}, "got an empty dictionary"),
        (lambda a, b: {"loss": a.sum(), "part": b.sum()}, "sum of its terms, here loss, part: remove 'loss'"),
    ],
)
def test_losses_with_other_values_are_refused(loss, message):
    with pytest.raises(ValueError, match=message) as error:
        JointEmbedding(encoder(), 0.1, loss=loss).loss(*torch.ones(2, 8, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda a, b: (a - a).sum() / (b - b).sum(), "loss at step 0 is nan; .* of the initial weights: add an eps"),
        (
            lambda a, b: (a - a).square().sum().sqrt(),
            r"loss at step 1 is nan; .*gradient .* at step 0: add an eps under",
        ),
    ],
)
def test_loss_that_is_not_finite_at_the_start_is_reported(loss, message, tmp_path):
    with pytest.raises(FloatingPointError, match=message) as error:
        fit(JointEmbedding(encoder(), 0.1, loss=loss), tmp_path, 3)
    assert "\n" not in str(error.value)


def test_any_function_trains_from_python_and_is_given_again_to_load(tmp_path):
    scale = 2.0
    for loss in (lambda a, b: scale * (a - b).square().mean(), partial(torch.nn.functional.mse_loss, reduction="sum")):
        module = JointEmbedding(encoder(), 0.01, loss=loss, driven_matrix="covariance")
        trainer = fit(module, tmp_path, 2)
        assert list(trainer.logged_metrics) == ["train/loss"]
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
        assert isinstance(checkpoint["hyper_parameters"]["loss"], str)
        checkpoint["hyper_parameters"]["loss"] = "os.getcwd"  # a checkpoint imports nothing
        torch.save(checkpoint, tmp_path / "end.ckpt")
        with pytest.raises(ValueError, match="needs a loss: .* also to load_from_checkpoint if the run has no config"):
            JointEmbedding.load_from_checkpoint(tmp_path / "end.ckpt", encoder=encoder())
        again = JointEmbedding.load_from_checkpoint(tmp_path / "end.ckpt", encoder=encoder(), loss=loss)
        assert again.loss_function is loss and torch.equal(again.encoder.weight, module.encoder.weight)


def test_driven_matrix_of_a_loss_comes_first():
    module = JointEmbedding(encoder(), 0.1, loss=torch.nn.MSELoss(), driven_matrix="tangent_covariance")
    assert PrimaryMatrix.of(module, list(MATRICES)).matrix == "tangent_covariance"


def test_modules_with_a_loss_of_their_own_take_no_other(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not {"loss", "driven_matrix"} & BarlowTwins(encoder(), 0.1).hparams.keys()
    config = changed({"model.init_args.loss": "torch.nn.functional.mse_loss"})
    assert "Option 'loss' is not accepted" in refusal(capsys, "fit", config=config)

    class Own(JointEmbedding):
        def loss_terms(self, z1, z2):
            return {"difference": (z1 - z2).square().mean()}

    assert fit(Own(encoder(), 0.1), tmp_path, 1, loader=pairs(1)).logged_metrics.keys() == {
        "train/loss", "train/difference"
    }  # fmt: skip
    with pytest.raises(ValueError, match="Own has a loss of its own: leave loss out, or use JointEmbedding"):
        Own(encoder(), 0.1, loss=torch.nn.MSELoss())
