"""Random configurations: valid ones train, invalid ones are refused with a line that names the key."""

import copy
import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_runs import CONFIG, changed, refusal, stepwise, write_images

pytestmark = [
    # Lightning's advice, on runs of two steps.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
]
ENCODER = "model.init_args.encoder"


def few(examples: int) -> settings:
    """Return settings of Hypothesis: the same examples in each run, without a deadline."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],  # shrinking takes minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a folder with forty images."""
    write_images(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def arguments(**choices: st.SearchStrategy) -> st.SearchStrategy:
    """Return a strategy for optional arguments."""
    return st.fixed_dictionaries({}, optional=choices)


def instance_of(name: str, init_args: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({"class_path": st.just(f"stepwise_lightning.{name}"), "init_args": init_args})


def between(least: float, most: float) -> st.SearchStrategy:
    return st.floats(least, most, allow_subnormal=False)


@st.composite
def datas(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Return a data module and the size of its views."""
    size = draw(st.integers(1, 10))
    if draw(st.booleans()):
        init_args = {"data": "images", "crop_size": size, "num_pairs": draw(st.integers(2, 40))}
        init_args |= draw(arguments(seed=st.integers(-(2**63), 2**63 - 1), steps_per_epoch=st.integers(1, 5)))
        return {"class_path": "stepwise_lightning.FixedCropPairs", "init_args": init_args}, size
    # The images are of 4×4 pixels.
    init_args = {"data": "images", "image_size": draw(st.sampled_from([None, size]))}
    init_args |= {"global_batch_size": draw(st.integers(2, 36)), "num_probe_pairs": draw(st.integers(2, 4))}
    init_args |= draw(
        arguments(augmentation=st.sampled_from(["standard", "weak"]), seed=st.integers(), probe_seed=st.integers())
    )
    return {"class_path": "stepwise_lightning.TwoViewDataModule", "init_args": init_args}, init_args["image_size"] or 4


@st.composite
def encoders(draw: st.DrawFn, size: int) -> tuple[dict[str, Any], str]:
    """Return an encoder and the name of a submodule to watch."""
    width, seed = st.integers(1, 12), st.integers(-(2**62), 2**62)
    out = {"out_features": draw(width)}
    kind = draw(st.sampled_from(["LinearEncoder", "encoders.MLP", "encoders.Encoder"]))
    if kind == "LinearEncoder":
        options = arguments(init_std=st.none() | between(0, 0.1), seed=seed)
        return draw(instance_of(kind, options.map(lambda o: out | {"in_features": 3 * size**2} | o))), "encoder"
    if kind == "encoders.MLP":
        hidden = draw(st.lists(width, max_size=3))
        options = arguments(bias=st.booleans(), seed=seed)
        init_args = out | {"in_features": 3 * size**2, "hidden": hidden} | draw(options)
        return {"class_path": f"stepwise_lightning.{kind}", "init_args": init_args}, "encoder.1"
    options = arguments(
        projector_depth=st.integers(1, 3), hidden_features=width, norm=st.sampled_from(["batch", "none"]),
        alpha=between(1e-4, 1), bias_norm=st.none() | between(0, 2), small_images=st.just(True), seed=seed,
    )  # fmt: skip
    return draw(instance_of(kind, options.map(lambda o: out | o))), "encoder.backbone"


@st.composite
def methods(draw: st.DrawFn, encoder: dict[str, Any]) -> dict[str, Any]:
    own = {
        "BarlowTwins": arguments(off_diagonal_weight=between(0, 2), normalize=st.booleans(), center=st.booleans(),
                                 eps=between(1e-6, 0.1)),
        "SimCLR": arguments(temperature=between(0.05, 5)),
        "VICReg": arguments(invariance_weight=between(0, 30), variance_weight=between(0, 30),
                            covariance_weight=between(0, 2), eps=between(1e-6, 0.1)),
    }  # fmt: skip
    name = draw(st.sampled_from(sorted(own)))
    common = arguments(
        momentum=between(0, 0.95), weight_decay=between(0, 0.01), warmup_steps=st.integers(0, 5), cosine=st.booleans()
    )
    init_args = {"encoder": encoder, "learning_rate": draw(between(1e-6, 1e-4))} | draw(own[name]) | draw(common)
    return {"class_path": f"stepwise_lightning.{name}", "init_args": init_args}


@st.composite
def trainers(draw: st.DrawFn, watch: str, labelled: bool) -> dict[str, Any]:
    matrices = st.lists(
        st.sampled_from(["cross_correlation", "covariance", "normalized_covariance"]), min_size=1, unique=True
    )
    logger = arguments(
        watch=st.sampled_from([[], [watch]]), matrices=matrices, center=st.booleans(), num_points=st.integers(2, 50),
        num_scalars=st.integers(0, 20), keep_embeddings=st.booleans(), probe=st.sampled_from(["auto", "batch"]),
    )  # fmt: skip
    callbacks = [draw(instance_of("SpectrumLogger", logger))]
    if labelled and draw(st.booleans()):
        name = draw(st.sampled_from(["evaluation.OnlineKNN", "evaluation.OnlineLinearProbe"]))
        callbacks.append({"class_path": f"stepwise_lightning.{name}", "init_args": {"watch": watch}})
    board = st.sampled_from(["CSVLogger", "TensorBoardLogger"])
    changes = {
        "callbacks": callbacks,
        "logger": {"class_path": f"lightning.pytorch.loggers.{draw(board)}", "init_args": {"save_dir": "runs"}},
    }
    # torch 2.15's bfloat16 convolutions on CPUs have gradients of 1e29 where images have few pixels.
    half = [] if watch == "encoder.backbone" else ["bf16-mixed"]
    options = arguments(
        precision=st.sampled_from(["32-true", "64-true", *half]), gradient_clip_val=between(0.1, 5),
        accumulate_grad_batches=st.integers(1, 2), log_every_n_steps=st.integers(0, 3),
        enable_checkpointing=st.booleans(), deterministic=st.booleans(), num_sanity_val_steps=st.integers(0, 1),
    )  # fmt: skip
    return CONFIG["trainer"] | changes | draw(options)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    data, size = draw(datas())
    encoder, watch = draw(encoders(size))
    trainer = draw(trainers(watch, labelled="TwoView" in data["class_path"]))
    return {"model": draw(methods(encoder)), "data": data, "trainer": trainer}


def trains_two_steps(config: dict[str, Any]) -> None:
    before = set(Path().glob("runs/*/*"))
    stepwise("fit", config=config)
    (run,) = set(Path().glob("runs/*/*")) - before
    with (run / "spectrum.csv").open(newline="") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"0", "1", "2"}
    assert (run / "spectrum.npz").is_file() and (run / "config.yaml").is_file()
    # The configuration can be read again; an untrained probe would be refused.
    checkpoints = [f"--ckpt_path={path}" for path in run.glob("checkpoints/*.ckpt")]
    if checkpoints or "OnlineLinearProbe" not in str(config):
        stepwise("validate", f"--config={run / 'config.yaml'}", *checkpoints)


@few(1)
@given(config=configurations())
def test_valid_configurations_train(config, folder):
    trains_two_steps(config)


@pytest.mark.slow
@settings(few(300), print_blob=True)
@given(config=configurations())
def test_many_valid_configurations_train(config, folder):
    trains_two_steps(config)


def keys(config: dict[str, Any], above: str = "") -> list[str]:
    """Return the dotted paths of all keys."""
    problems = []
    for key, value in config.items():
        problems.append(f"{above}{key}")
        if isinstance(value, dict):
            problems += keys(value, f"{above}{key}.")
    return problems


@st.composite
def typos(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """Return CONFIG with one misspelt key, and a pattern for the key in the message."""
    path = draw(st.sampled_from(keys(CONFIG)))
    right = path.rpartition(".")[2]
    position = draw(st.integers(0, len(right) - 1))
    letter = draw(st.sampled_from("qxz"))
    cut, insert = right[:position] + right[position + 1 :], right[:position] + letter + right[position:]
    wrong = draw(st.sampled_from([cut, insert, right[:position] + letter + right[position + 1 :]]))
    config = copy.deepcopy(CONFIG)
    place = config
    for part in path.split(".")[:-1]:
        place = place[part]
    place[wrong] = place.pop(right)
    return config, f"class_path|{wrong}" if right == "class_path" else wrong  # the message may name the missing key


NUMBERS = ["model.init_args.learning_rate", f"{ENCODER}.init_args.in_features", f"{ENCODER}.init_args.out_features",
           f"{ENCODER}.init_args.init_std", "data.init_args.global_batch_size", "data.init_args.num_probe_pairs",
           "trainer.max_steps", "trainer.log_every_n_steps"]  # fmt: skip
OTHERS = ["trainer.enable_progress_bar", "trainer.callbacks", "trainer.logger", "data.init_args.augmentation", "data",
          "model", ENCODER]  # fmt: skip
WRONG = st.sampled_from(["fast", "12e", [1, 2], {"a": 1}, "", [], "1, 2", "nowhere.Nothing", {"class_path": 3}, "ü"])


@st.composite
def wrong_types(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    path, value = draw(st.sampled_from(NUMBERS + OTHERS)), draw(WRONG)
    if path in ("trainer.callbacks", "trainer.logger") and value == []:
        value = "fast"  # an empty list is valid
    # for a class, the message may name the wrong keys inside
    own = [*value] if isinstance(value, dict) else []
    return changed({path: value}), "|".join([path.rpartition(".")[2], *own])


NEGATIVE, NOT_FINITE = between(-1e9, -1e-9), st.sampled_from([float("nan"), float("inf"), float("-inf")])
BELOW_1 = st.integers(-(10**9), 0)
KINDS = {
    "barlow": {}, "simclr": {"model.class_path": "stepwise_lightning.SimCLR"},
    "vicreg": {"model.class_path": "stepwise_lightning.VICReg"},
    "mlp": {ENCODER: {"class_path": "stepwise_lightning.encoders.MLP",
                      "init_args": {"in_features": 48, "hidden": [4], "out_features": 3}}},
    "resnet": {ENCODER: {"class_path": "stepwise_lightning.encoders.Encoder", "init_args": {"out_features": 3}}},
    "crops": {"data": {"class_path": "stepwise_lightning.FixedCropPairs",
                       "init_args": {"data": "images", "num_pairs": 8, "crop_size": 4}}},
}  # fmt: skip
M, E, D, T = "model.init_args.", f"{ENCODER}.init_args.", "data.init_args.", "trainer."
OUT_OF_RANGE: list[tuple[str, str, st.SearchStrategy]] = [
    *(("barlow", M + key, NEGATIVE | NOT_FINITE) for key in
      ("learning_rate", "momentum", "weight_decay", "off_diagonal_weight", "eps")),
    *(("vicreg", M + key, NEGATIVE | NOT_FINITE) for key in
      ("invariance_weight", "variance_weight", "covariance_weight", "eps")),
    ("barlow", M + "momentum", between(1, 9)), ("barlow", M + "warmup_steps", st.integers(max_value=-1)),
    ("simclr", M + "temperature", NEGATIVE | NOT_FINITE | st.just(0.0)),
    ("barlow", E + "init_std", NEGATIVE | NOT_FINITE), ("barlow", E + "seed", st.integers(min_value=2**63)),
    ("barlow", E + "in_features", BELOW_1 | st.integers(1, 47)), ("barlow", E + "out_features", BELOW_1),
    ("mlp", E + "in_features", BELOW_1 | st.integers(1, 47)), ("mlp", E + "out_features", BELOW_1),
    ("mlp", E + "hidden", st.lists(BELOW_1, min_size=1, max_size=3)),
    ("mlp", E + "seed", st.integers(max_value=-(2**63) - 1)),
    *(("resnet", E + key, BELOW_1) for key in ("out_features", "projector_depth", "hidden_features")),
    *(("resnet", E + key, NEGATIVE | NOT_FINITE) for key in ("alpha", "bias_norm")),
    ("barlow", D + "global_batch_size", st.integers(max_value=1) | st.integers(min_value=37)),
    ("barlow", D + "num_probe_pairs", st.integers(max_value=1) | st.integers(min_value=5)),
    ("barlow", D + "image_size", BELOW_1), ("barlow", D + "num_workers", st.integers(max_value=-1)),
    ("crops", D + "num_pairs", BELOW_1 | st.integers(min_value=41)),
    ("crops", D + "crop_size", BELOW_1 | st.integers(min_value=33)), ("crops", D + "steps_per_epoch", BELOW_1),
    ("crops", D + "seed", st.integers(min_value=2**63)),
    ("barlow", "seed_everything", st.integers(max_value=-1) | st.integers(min_value=2**32)),
    ("barlow", T + "max_steps", st.integers(max_value=-2)), ("barlow", T + "max_epochs", st.integers(max_value=-2)),
    ("barlow", T + "accumulate_grad_batches", BELOW_1), ("barlow", T + "gradient_clip_val", between(-9, -0.1)),
    ("barlow", T + "check_val_every_n_epoch", BELOW_1), ("barlow", T + "limit_train_batches", between(-9, -0.1)),
    ("barlow", T + "log_every_n_steps", st.integers(max_value=-1)), ("barlow", T + "devices", BELOW_1.map(str)),
    ("barlow", T + "num_nodes", BELOW_1), ("barlow", T + "precision", st.integers(65, 99).map(str)),
]  # fmt: skip


@st.composite
def out_of_range(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    kind, path, values = draw(st.sampled_from(OUT_OF_RANGE))
    # in this order: the second change is inside the value of the first one
    return changed(copy.deepcopy(KINDS[kind]) | {path: draw(values)}), path.rpartition(".")[2]


def names_the_key(config: dict[str, Any], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "fit", config=config)
    assert re.search(rf"\b({key.removeprefix('projector_')})", line), line
    assert not os.path.exists("runs") or not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("kind", [typos, wrong_types, out_of_range])
def test_invalid_configurations_name_the_key(kind, folder, capsys):
    @few(2)
    @given(case=kind())
    def check(case: tuple[dict[str, Any], str]) -> None:
        names_the_key(*case, capsys)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [typos, wrong_types, out_of_range])
def test_many_invalid_configurations_name_the_key(kind, folder, capsys):
    @few(400)
    @given(case=kind())
    def check(case: tuple[dict[str, Any], str]) -> None:
        names_the_key(*case, capsys)

    check()
