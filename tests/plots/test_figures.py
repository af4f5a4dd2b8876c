"""The figures show what they are given: positions, scales and labels, read back from the figure itself."""

import io

import numpy as np
import pytest
import torch

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.plots import (
    Panel,
    Response,
    alignment_figure,
    doses_figure,
    eigenfunctions_figure,
    eigenvalues_figure,
    embedding_figure,
    mode_colours,
    spectra_figure,
    trajectories_figure,
)


def growth(rates: list[float], matrix: str = "cross_correlation") -> Panel:
    times = torch.linspace(0, 10, 50, dtype=torch.float64)
    eigenvalues = 1 / (1 + 1e6 * torch.exp(-times[:, None] * torch.tensor(rates, dtype=torch.float64)))
    record = SpectrumRecord.of(times, eigenvalues, 3 - eigenvalues.sum(1), matrix)
    return Panel(record, title="run", step_times=torch.tensor([5.0, np.nan, 7.0]))


def test_trajectories_have_a_line_per_mode_and_a_mark_per_step():
    runs = [growth([8.0, 4, 2]), growth([9.0, 5, 1])]
    figure = trajectories_figure(runs, title="two runs", log_eigenvalues=True)
    upper, lower = figure.axes[0], figure.axes[2]
    curves = [line for line in lower.lines if len(line.get_xdata()) == 49]  # time 0 has no place on a log axis
    np.testing.assert_array_equal([line.get_ydata() for line in curves], runs[0].eigenvalues[1:].T)
    marks = [line.get_xdata()[0] for line in lower.lines if line.get_linestyle() == ":"]
    assert marks == [5, 7] and upper.get_xscale() == "log" and lower.get_yscale() == "log"
    assert upper.get_shared_y_axes().joined(upper, figure.axes[1])


def test_black_dashes_show_on_the_colour_of_every_mode():
    """A contrast of three, as text in large letters needs."""
    channels = np.array(mode_colours(16))[:, :3]
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (luminance + 0.05).min() / 0.05 >= 3 and (np.diff(luminance) > 0).all()


def test_legends_explain_the_lines_that_there_are():
    dotted = growth([8.0, 4, 2])
    crossing = dotted.eigenvalues - 0.01  # C has eigenvalues below 0, which a logarithm leaves out
    broken = Panel(SpectrumRecord.of(dotted.record.times, torch.tensor(crossing)), step_times=(), theory=dotted.record)
    for panel, expected in (
        (dotted, ["experiment", "detected step"]), (broken, ["experiment", "theory", "gap: eigenvalue below 0"]),
    ):  # fmt: skip
        alone = trajectories_figure([panel], log_eigenvalues=True).axes[0].get_legend()
        shared = eigenvalues_figure([[panel]], [""], title="t", note="n").legends[0]
        assert [text.get_text() for text in alone.get_texts()] == expected
        assert [text.get_text() for text in shared.get_texts()] == expected
        assert shared.get_title().get_text() == "n"


def test_runs_of_different_losses_keep_their_own_axes():
    runs = [growth([8.0, 4, 2]), growth([9.0, 5, 1], "covariance")]
    figure = trajectories_figure(runs, title="two losses", same_axes=False)
    assert not figure.axes[0].get_shared_y_axes().joined(figure.axes[0], figure.axes[1])
    assert figure.axes[3].get_ylabel() == "eigenvalues of\nthe covariance"


def test_round_off_stretches_no_logarithmic_axis():
    times = torch.linspace(1, 10, 20)
    modes = torch.stack([torch.linspace(1e-4, 1, 20), torch.full((20,), 1e-17)], dim=1)
    theory = SpectrumRecord.of(times, modes * torch.tensor([1.0, 1e-290]))
    axis = trajectories_figure([Panel(SpectrumRecord.of(times, modes), theory=theory)], log_eigenvalues=True).axes[1]
    low, high = axis.get_ylim()
    assert 1e-5 < low < 1e-4 and 1 < high < 10


def test_panels_have_a_time_of_their_own_where_they_are_different_experiments():
    records = [SpectrumRecord.of(torch.linspace(1, end, 20), torch.linspace(0.1, 1, 20)[:, None]) for end in (2, 50)]
    rows = [[Panel(records[0])], [Panel(records[1])]]
    ends = {
        same: [axis.get_xlim()[1] for axis in eigenvalues_figure(rows, ["", ""], "", same_time=same).axes]
        for same in (True, False)
    }
    assert ends == {True: [2, 2], False: [2, 50]}


def test_spectra_are_those_nearest_to_the_chosen_times():
    run = growth([8.0, 4, 2])
    figure = spectra_figure(run, [0.0, 5.03, 99], title="spectrum")
    first, middle, last = (line.get_ydata() for line in figure.axes[0].lines)
    np.testing.assert_array_equal(first, run.eigenvalues[0])
    np.testing.assert_array_equal(middle, run.eigenvalues[np.abs(run.times - 5.03).argmin()])
    np.testing.assert_array_equal(last, run.eigenvalues[-1])


@pytest.mark.parametrize("dimensions", [2, 7])
def test_embeddings_are_shown_in_the_components_of_the_last(dimensions):
    rng = np.random.default_rng(0)
    scales = np.array([3.0, 2, 1, 0.1, 0.1, 0.1, 0.1])[:dimensions]
    rotation = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]
    last = rng.standard_normal((400, dimensions)) * scales @ rotation + 5
    embeddings = np.stack([1e-3 * last, last])
    figure = embedding_figure(embeddings, ["start", "end"], labels=rng.integers(0, 3, 400))
    start, end = (np.array(axis.collections[0]._offsets3d) for axis in figure.axes)
    np.testing.assert_allclose(start, 1e-3 * end, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(np.cov(last.T, bias=True))[::-1][:3]
    np.testing.assert_allclose(end.var(1)[: len(eigenvalues)], eigenvalues, rtol=1e-10)
    for side, coordinates in zip("xyz", end, strict=True):
        low, high = getattr(figure.axes[0], f"get_{side}lim")()
        assert (low, high) == getattr(figure.axes[1], f"get_{side}lim")()
        assert low < coordinates.min() and high > coordinates.max()


def test_alignments_lie_below_the_eigenvalues_they_belong_to():
    runs = [growth([8.0, 4, 2]), growth([9.0, 5, 1])]
    values = {"first": runs[0].times / 10, "second": runs[0].times / 20, "baseline": 0 * runs[0].times}
    values["chance"] = values["baseline"] + 0.1
    figure = alignment_figure(runs, [values, values], title="alignments")
    lines = figure.axes[2].lines
    assert [line.get_label() for line in lines] == list(values)
    np.testing.assert_array_equal(lines[1].get_ydata(), values["second"])
    assert figure.axes[2].get_ylim()[0] == 0 and figure.axes[0].get_shared_x_axes().joined(*figure.axes[::2])


def test_the_images_at_both_ends_of_a_mode_stand_in_order():
    runs = [growth([8.0, 4, 2])]
    images = np.random.default_rng(0).random((3, 4, 5, 6, 3))
    figure = eigenfunctions_figure(runs, [list(images)], title="modes")
    shown = np.asarray(figure.axes[2].images[0].get_array())
    assert shown.shape == (5, 4 * 6 + 3, 3)
    np.testing.assert_array_equal(shown[:, :6], images[1, 0])
    np.testing.assert_array_equal(shown[:, -6:], images[1, 3])
    fewer = eigenfunctions_figure(runs * 2, [list(images), list(images[:2])], title="modes")
    assert [bool(axis.axison) for axis in fewer.axes] == [True] * 7 + [False]


def test_responses_are_dots_around_the_means_of_their_doses():
    values = np.array([[9.0, 8, 1], [9, 6, 1]])
    response = Response(["small", "middle", "large"], {"steps": values}, "number")
    axis = doses_figure([[growth([8.0, 4, 2])] * 3], [response], title="doses").axes[-1]
    mean, *dots = (line.get_ydata() for line in axis.lines)
    np.testing.assert_array_equal(mean, [9, 7, 1])
    np.testing.assert_array_equal(dots, values)
    assert [label.get_text() for label in axis.get_xticklabels()] == response.doses


@pytest.mark.parametrize("shape", [(4, 0), (4, 3)])
def test_nothing_to_draw_is_drawn(shape):
    """No eigenvalues asked for, or a collapsed embedding: no warning of a logarithm of zero."""
    record = SpectrumRecord.of(torch.arange(4.0), torch.zeros(shape), torch.ones(4))
    trajectories_figure(record, title="t", log_eigenvalues=True).savefig(io.BytesIO())
