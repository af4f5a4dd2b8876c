"""Whether two runs are the same, bit by bit, in everything that they have written."""

import math

import numpy as np
import torch
from survival import STEPS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def assert_same(ours, theirs, where=""):
    """Compare bit by bit, in any nesting; NaN is NaN."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(
            ours.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0)
        ), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert ours == theirs or (isinstance(ours, float) and math.isnan(ours) and math.isnan(theirs)), where


def scalars(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_run(killed, whole):
    """Weights, optimiser, schedule, probe, spectra, random numbers; the table, the arrays and the events."""
    ours, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (killed, whole))
    assert ours["global_step"] == STEPS
    for each in (ours, theirs):
        del each["loops"]  # how many batches this process has seen, besides the position
        del each["datamodule_hyper_parameters"]["num_workers"]  # the only setting that may differ
    assert_same(ours, theirs)
    assert (killed / "spectrum.csv").read_bytes() == (whole / "spectrum.csv").read_bytes()
    with np.load(killed / "spectrum.npz") as a, np.load(whole / "spectrum.npz") as b:
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert scalars(killed) == scalars(whole)
    assert not list(killed.rglob(".*.partial*"))
