"""One seed for initial weights, data and everything else that has no seed given."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import changed, refusal, stepwise, write_images

from stepwise_lightning import MLP, BarlowTwins, Encoder, FixedCropPairs, LinearEncoder, TwoViewDataModule, load_encoder
from stepwise_lightning.callbacks.progress import seeds_in_use
from stepwise_lightning.data.seeded_datamodule import SeededDataModule
from stepwise_lightning.encoders import scale_last_layer
from stepwise_lightning.runs.saved import configured_encoder

ENCODER, DATA = "model.init_args.encoder.init_args.seed", "data.init_args.seed"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(name, *options, changes=None):
    """Train two steps; return the path of the checkpoint."""
    stepwise("fit", f"--trainer.logger.init_args.name={name}", *options, config=changed(changes or {}))
    return Path("runs", name, "version_0/checkpoints/last.ckpt")


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]["encoder.weight"]


def views(data):
    """Return the views and the order of a data module's first batch."""
    data.setup("fit")
    x1, x2, _ = next(iter(data.train_dataloader()))
    return list(data.train_dataloader().sampler), torch.cat([x1, x2])


@pytest.mark.parametrize("option", [pytest.param("--seed_everything=1", marks=pytest.mark.slow), "--seed=1"])
def test_seed_everything_seeds_weights_and_data(option, capsys):
    first = fit("first")
    assert "seeds: seed_everything 0, data.probe_seed 0\n" in capsys.readouterr().out
    second = fit("second", option)
    assert "seeds: seed_everything 1, data.probe_seed 0\n" in capsys.readouterr().out
    assert (weights(first) - weights(second)).abs().max() > 1e-4
    assert torch.load(second, weights_only=True)["datamodule_hyper_parameters"]["seed"] == 1
    initial = configured_encoder(second)
    assert torch.equal(initial.weight, LinearEncoder(48, 3, 1e-3, seed=1).weight)
    assert torch.equal(load_encoder("runs/second/version_0").weight, weights(second))


def test_given_seeds_win(capsys):
    first = fit("first")
    changes = {ENCODER: 0, DATA: 0}
    assert torch.equal(weights(first), weights(fit("given", "--seed_everything=1", changes=changes)))
    assert "seeds: seed_everything 1, model.encoder.seed 0, data.probe_seed 0, data.seed 0\n" in capsys.readouterr().out
    assert not torch.equal(weights(first), weights(fit("weights", "--seed_everything=1", changes={DATA: 0})))
    assert not torch.equal(weights(first), weights(fit("data", "--seed_everything=1", changes={ENCODER: 0})))


def test_seeds_in_use_include_those_of_other_classes():
    own = {"class_path": "own.Net", "init_args": {"seed": 7, "depth": 2}}
    callbacks = [{"class_path": "own.Callback", "init_args": {"noise_seed": 3}}]
    config = {"seed_everything": 1, "model": {"encoder": own}, "trainer": {"callbacks": callbacks}}
    assert seeds_in_use(config) == "seeds: seed_everything 1, model.encoder.seed 7, trainer.callbacks.noise_seed 3"
    torch.manual_seed(5)
    assert seeds_in_use({"seed_everything": False}) == "seeds: torch's seed 5"


def test_resuming_with_another_seed_is_refused(capsys):
    path = fit("first")
    message = "the checkpoint was trained with seed_everything=0, not 1: resume with the configuration of the run"
    assert message in refusal(capsys, "fit", f"--ckpt_path={path}", "--seed_everything=1")


@pytest.mark.parametrize(
    "build",
    [lambda **seed: Encoder(4, bias_norm=1.0, **seed), lambda **seed: MLP(12, [8], 3, **seed),
     lambda **seed: LinearEncoder(12, 3, **seed),
     lambda **seed: scale_last_layer(MLP(12, [8], 3, seed=0), 1.0, bias_norm=1.0, **seed)],
)  # fmt: skip
def test_encoders_use_the_global_seed(build):
    torch.manual_seed(3)
    torch.rand(7)  # numbers drawn before change nothing
    assert all(map(torch.equal, build().state_dict().values(), build(seed=3).state_dict().values()))
    torch.manual_seed(-1)  # the largest seed of torch
    build()


def test_data_modules_use_the_global_seed():
    settings = {"augmentation": "weak", "global_batch_size": 4}
    (order, x), (same_order, same_x), (other_order, other_x) = (
        (torch.manual_seed(number), views(TwoViewDataModule("images", **settings)))[1] for number in (3, 3, 4)
    )
    assert order == same_order != other_order and torch.equal(x, same_x) and not torch.equal(x, other_x)
    assert torch.equal(x, views(TwoViewDataModule("images", seed=3, **settings))[1])
    torch.manual_seed(3)
    pairs, given = (FixedCropPairs("images", num_pairs=4, crop_size=3, seed=seed) for seed in (None, 3))
    pairs.setup()
    given.setup()
    assert pairs.hparams["seed"] == pairs.seed == 3 and torch.equal(pairs.x1, given.x1)


@pytest.mark.parametrize("new", [TwoViewDataModule, FixedCropPairs])
def test_ranks_and_resumed_runs_share_the_seed(new):
    torch.manual_seed(1)
    data, given = new(), new(seed=2)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(broadcast=lambda seed: 5), lightning_module=None
    )  # rank 0 has 5
    SeededDataModule.setup(data, "fit")
    assert data.seed == data.hparams["seed"] == 5
    SeededDataModule.load_state_dict(given, {"seed": 8})
    SeededDataModule.load_state_dict(data, {"seed": 8})
    assert data.seed == data.hparams["seed"] == 8 and given.seed == 2


def test_two_trainers_in_one_process_and_a_resumed_one():
    def pairs():
        return FixedCropPairs("images", num_pairs=4, crop_size=3)

    def train(steps, **options):
        data, module = pairs(), Own(LinearEncoder(27, 2), 1e-3)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        logger = CSVLogger("logs")
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=logger, log_every_n_steps=1, limit_val_batches=0, **quiet
        )
        trainer.fit(module, data, **options)
        return data, module.encoder.weight.detach(), trainer

    class Own(BarlowTwins):
        """A module with a hyperparameter ``seed``, which Lightning logs with the seed of the data."""

        def __init__(self, encoder, learning_rate, seed=0):
            super().__init__(encoder, learning_rate)

    torch.manual_seed(0)
    _, first, trainer = train(2)
    trainer.save_checkpoint("last.ckpt")
    torch.manual_seed(1)
    data, second, _ = train(2)
    assert not torch.equal(first, second) and data.seed == 1
    torch.manual_seed(0)
    assert torch.equal(train(2)[1], first)
    whole = train(4)[1]
    torch.manual_seed(2)
    data, resumed, _ = train(4, ckpt_path="last.ckpt")
    assert data.seed == 0 and torch.equal(resumed, whole)
