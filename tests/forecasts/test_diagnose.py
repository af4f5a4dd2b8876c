"""``diagnose``: verdicts of records and losses, and causes from a network and its data."""

import math

import pytest
import torch
from small_forecasts import ANALYTICAL
from small_records import STEPS, decaying, record_of, rising
from torch import nn

from stepwise_lightning import (
    BarlowTwins,
    JointEmbedding,
    SimCLR,
    SpectrumRecord,
    VICReg,
    diagnose,
    scale_last_layer,
)
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import LastLayer

VERDICTS = {
    "learned recently": ([rising(100), rising(390)], "learning", 2),
    "rising": ([rising(100), rising(430)], "learning", 1),
    "next mode is small": ([rising(100), rising(600, 0.05)], "plateau", 1),
    "first mode is small": ([rising(700, 0.05), rising(900, 0.05)], "plateau", 0),
    "decaying": ([decaying(0.01), decaying(0.02)], "stuck", 0),
    "constant": ([decaying(0), decaying(0)], "stuck", 0),
    "zero": ([decaying(0, 0.0), decaying(0, 0.0)], "stuck", 0),
    "all learned": ([rising(50), rising(90), rising(100)], "finished", 3),
    "fallen back": ([lambda t: rising(50)(t) * (t < 150) + 1e-6, decaying(0)], "fell_back", 0),
    "collapsed from a large start": ([decaying(0.1, 1.0), decaying(0.1, 0.5)], "collapsed", 0),
}


@pytest.mark.parametrize(("modes", "verdict", "num_learned"), VERDICTS.values(), ids=VERDICTS)
def test_verdict_of_a_record(modes, verdict, num_learned):
    modes += [decaying(0, 1e-9)] * (verdict not in ("finished", "stuck"))
    result = diagnose(record_of(*modes), loss="barlow_twins", settings=ANALYTICAL)
    assert (result.verdict, result.num_learned) == (verdict, num_learned)
    assert bool(result.possible_causes) == (verdict in ("stuck", "fell_back", "collapsed"))
    assert f"at step 400: {num_learned or 'none'} of {len(modes)} modes" in str(result)


def test_run_whose_loss_explodes_has_diverged():
    losses = torch.full((len(STEPS),), 2.0).index_fill(0, torch.tensor([len(STEPS) - 1]), 1e8)
    result = diagnose(record_of(rising(900), losses=losses), loss="barlow_twins", settings=ANALYTICAL)
    assert result.verdict == "diverged" and "the learning rate is too high" in result.possible_causes


@pytest.mark.parametrize(("num_missing", "verdict"), [(1, "stuck"), (2, "diverged"), (20, "diverged")])
def test_run_whose_losses_end_in_nan_has_diverged(num_missing, verdict):
    losses = torch.full((len(STEPS),), 2.0)
    losses[-num_missing:] = math.nan
    result = diagnose(record_of(rising(900), decaying(0), losses=losses), loss="barlow_twins", settings=ANALYTICAL)
    assert result.verdict == verdict


def test_record_of_an_unknown_loss_raises_no_alarm():
    result = diagnose(record_of(decaying(0.001, 0.5), decaying(0, 0.4)))
    assert result.verdict == "plateau" and "plateaus of the loss are not known" in str(result)


def test_growth_and_next_step_of_a_record():
    result = diagnose(record_of(rising(700, 0.02)), loss="barlow_twins", settings=ANALYTICAL, max_steps=800)
    assert result.growth_per_step == pytest.approx(math.exp(0.01), abs=2e-4)
    assert result.next_step == pytest.approx(700 - math.log(9) / 0.02, rel=0.02)  # of the threshold 0.1
    assert result.cause == "nothing is wrong" and "wait until step" in result.remedy
    result = diagnose(record_of(rising(700, 0.02)), loss="barlow_twins", settings=ANALYTICAL, max_steps=450)
    assert result.verdict == "stuck" and "the learning rate is too low" in result.possible_causes


@pytest.mark.parametrize(("max_steps", "cause"), [(None, "nothing is wrong"), (10**6, "nothing is wrong"), (1300, "")])
def test_plateau_that_lasts_longer_than_training_is_not_healthy(max_steps, cause):
    record = record_of(rising(100), decaying(-2e-4), decaying(0, 1e-9))
    result = diagnose(record, loss="barlow_twins", settings=ANALYTICAL, max_steps=max_steps)
    assert (result.verdict, result.cause, result.num_learned) == ("plateau", cause, 1)
    assert ("and training has 1300" in str(result)) == (not cause)


def test_matrix_is_by_default_the_one_that_the_loss_drives():
    record = record_of(rising(100), rising(100))
    arrays = record.arrays() | {"covariance": record_of(rising(100), decaying(0)).eigenvalues()}
    record = SpectrumRecord.from_arrays(arrays)
    assert diagnose(record, loss="vicreg").num_learned == 1
    assert diagnose(record, loss="vicreg", matrix="cross_correlation").num_learned == 2
    with pytest.raises(ValueError, match="no matrix 'nosuch' in this record"):
        diagnose(record, matrix="nosuch")


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (0.1, {"num_pairs": "64"}, "num_pairs must be a positive integer, got '64'"),
        (0.1, {"max_steps": -1}, "max_steps must be a positive integer, got -1"),
        (0.1, {"num_feature_pairs": 0}, "num_feature_pairs must be a positive integer"),
        (0.1, {"loss": 3}, "loss must be a name or a function"),
        (0.1, {"loss": "nosuch"}, "loss must be one of barlow_twins, vicreg, .* got 'nosuch'"),
        (0.1, {"loss": "vicreg", "settings": {"nosuch": 1}}, "vicreg has no setting nosuch"),
        (0.1, {"settings": {"eps": 1}}, "settings belong to a loss, got eps"),
        (math.inf, {}, "cross_correlation has no finite eigenvalues in 48 measurements"),
        (math.nan, {}, "no finite eigenvalues"),
    ],
)
def test_invalid_argument_or_record_is_refused(value, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(record_of(lambda steps: value + 0 * steps), **options)


def test_growth_of_a_plateau_with_few_measurements():
    learned = rising(310, 0.5)  # with three later measurements
    result = diagnose(record_of(learned, rising(700, 0.02)), loss="barlow_twins", settings=ANALYTICAL)
    assert result.num_learned == 1 and result.growth_per_step == pytest.approx(math.exp(0.01), abs=1e-3)


def test_record_excludes_causes_that_settings_rule_out():
    record = record_of(decaying(0.01), decaying(0.01))
    options = {"loss": "barlow_twins", "settings": ANALYTICAL}
    assert len(diagnose(record, **options).possible_causes) == 6
    known = diagnose(record, **options, weight_decay=0.0, precision=32).possible_causes
    assert not {"weight decay is not below the growth rate", "half precision loses small differences"} & set(known)
    assert "give the module" in str(diagnose(record, **options))


# --- causes


def views(shared=1.0, seed=0, num_batches=16):
    """Return batches of 32 pairs of 8 features, of which the first has the largest variance."""
    generator = torch.Generator().manual_seed(seed)
    content, *noise = torch.randn(3, num_batches, 32, 8, generator=generator) * torch.logspace(0, -1, 8)
    return list(zip(*(shared * content + 0.3 * each + 1 for each in noise), strict=True))


def module_of(kind=BarlowTwins, learning_rate=0.1, alpha=0.01, **settings):
    if kind is BarlowTwins:
        settings = ANALYTICAL | settings
    torch.manual_seed(0)
    return kind(nn.Sequential(scale_last_layer(nn.Linear(8, 3), alpha, 1.0)), learning_rate, **settings)


def without_variance(z1, z2):
    return (z1 - z2).square().sum(1).mean()


PLANTED = {
    "low rate": (module_of(learning_rate=1e-4), {}, {}, "the learning rate is too low"),
    "weight decay": (module_of(weight_decay=9.0), {}, {}, "weight decay is not below the growth rate"),
    "unrelated views": (module_of(), {"shared": 0.0}, {}, "pairs share nothing beyond chance"),
    "equal features": (module_of(), None, {}, "features are equal for all images"),
    "SimCLR in bfloat16": (module_of(SimCLR, alpha=1e-3), {}, {"precision": "bf16-true"},
                           "half precision loses small differences"),
    "SimCLR in float32": (module_of(SimCLR, alpha=1e-3), {}, {"precision": "32-true"}, "nothing is wrong"),
    "update below the resolution": (module_of(learning_rate=1e-4), {}, {"precision": "16-true"},
                                    "half precision loses small differences"),
    "variance weight": (module_of(VICReg, variance_weight=1e-3, eps=0.01), {}, {}, "no mode can grow"),
    "function": (module_of(JointEmbedding, loss=without_variance), {}, {}, "no mode can grow"),
    "healthy": (module_of(), {}, {}, "nothing is wrong"),
}  # fmt: skip


@pytest.mark.parametrize(("module", "data", "options", "cause"), PLANTED.values(), ids=PLANTED)
def test_planted_cause_is_found(module, data, options, cause):
    batches = [(torch.ones(32, 8), torch.ones(32, 8))] * 4 if data is None else views(**data)
    matrix = module.driven_matrix or "covariance"
    losses = torch.zeros(len(STEPS)) if module.loss_function else None  # its saddle value, without which θ is unknown
    first = decaying(0, 1e-7) if cause == "no mode can grow" else rising(9000, 1e-3, 0.0)
    record = record_of(first, decaying(0, 1e-9), decaying(0, 1e-10), losses=losses, matrix=matrix)
    result = diagnose(record, module, batches, max_steps=2000, **options)
    assert result.cause == cause and result.remedy, str(result)
    assert result.verdict == ("plateau" if cause == "nothing is wrong" else "stuck")
    assert f"Cause: {cause}" in str(result)


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-9])
def test_low_rate_is_found_if_the_loss_is_not_at_its_saddle_value(learning_rate):
    modes = rising(9000, 1e-3, 0.0), decaying(0, 1e-9), decaying(0, 1e-10)
    record = record_of(*modes, losses=torch.full((len(STEPS),), 3.0), matrix="tangent_covariance")
    result = diagnose(record, module_of(SimCLR, learning_rate=learning_rate), views(), max_steps=500)
    assert (result.verdict, result.cause) == ("stuck", "the learning rate is too low"), str(result)
    assert "inf" not in str(result)


def test_causes_of_a_later_plateau():
    generator = torch.Generator().manual_seed(0)
    content, *noise = torch.randn(3, 16, 32, 8, generator=generator)
    content[..., 1:] *= 0.0
    batches = list(zip(*(content + 0.1 * each for each in noise), strict=True))  # one feature has shared content
    fluctuating = 1e-5 * torch.randn(len(STEPS), generator=generator, dtype=torch.float64).exp()
    first = 0.1 * rising(50)(STEPS.double())  # stays below the θ of the usual weights
    record = record_of(lambda _: first, lambda _: fluctuating, decaying(0.002), matrix="covariance")
    module = module_of(VICReg, variance_weight=1.0, eps=0.01)
    result = diagnose(record, module, batches, max_steps=2000)
    assert (result.verdict, result.cause, result.num_learned) == ("stuck", "few modes can grow", 1), str(result)
    record = record_of(rising(50), decaying(0.001), decaying(0.002))
    result = diagnose(record, module_of(learning_rate=1e-4), views(), max_steps=401)
    assert result.verdict == "plateau" and not result.remedy and "does not grow; features may change" in str(result)
    result = diagnose(record, module_of(weight_decay=3.0), views(), max_steps=2000)
    assert (result.verdict, result.cause) == ("stuck", "weight decay is not below the growth rate"), str(result)


def test_high_rate_is_found_from_the_initial_weights():
    losses = torch.logspace(0, 8, len(STEPS))
    module = module_of(learning_rate=3.0)
    result = diagnose(record_of(rising(5), losses=losses), module, views(), start=0)
    assert (result.verdict, result.cause) == ("diverged", "the learning rate is too high")
    assert "is safe" in result.evidence


@pytest.mark.parametrize("half_way_to", [0, 1])
def test_next_step_and_growth_agree_with_training(half_way_to):
    module = module_of(learning_rate=0.1, alpha=1e-3)
    batches, layer = views(num_batches=32), module.encoder[0]
    h1, h2 = (torch.stack(view).double() for view in zip(*batches, strict=True))
    last = LastLayer("barlow_twins", h1, h2, layer.weight, layer.bias, **ANALYTICAL)
    times = last.simulate([0.1] * 800, 0.0, measured_at=range(801)).eigenvalues
    learned_at = [int((times[:, mode] > 0.1).nonzero()[0]) for mode in range(2)]
    step = (learned_at[half_way_to] + (learned_at[0] if half_way_to else 0)) // 2
    points = log_spaced_steps(step, 60)
    state = last.simulate([0.1] * step, 0.0, measured_at=points)
    record = SpectrumRecord.of(0.1 * state.steps, state.eigenvalues, steps=state.steps)
    layer.weight.data, layer.bias.data = state.weight.float(), state.bias.float()
    result = diagnose(record, module, batches, max_steps=800)
    assert result.num_learned == half_way_to
    # features do not move here, which the forecast of later modes corrects for
    assert result.next_step == pytest.approx(learned_at[half_way_to], rel=0.2 if half_way_to else 0.02)
    assert result.growth_per_step - 1 == pytest.approx(result.expected_growth - 1, rel=0.1)
    low, high = result.next_range
    assert low < result.next_step < high


def test_module_without_known_growth_rates_gets_a_verdict():
    record = record_of(decaying(0.001, 0.5), decaying(0, 0.001), matrix="covariance")
    foreign = nn.Sequential(nn.Linear(8, 3), nn.ReLU())
    for loss, text in ((None, "Sequential has no known loss"), ("simclr", "learning_rate must be given")):
        result = diagnose(record, foreign, views(), loss=loss, num_pairs=32)
        assert result.verdict == "plateau" and "Growth rates are not known" in str(result) and text in str(result)
    result = diagnose(record, foreign, views(), loss="simclr")  # the size of the batches is the number of pairs
    assert result.saddle_value == pytest.approx(math.log(63))
