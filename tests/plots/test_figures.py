"""Figures of records: positions, scales and labels, read back from the figure."""

import io

import numpy as np
import pytest
import torch

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.plots import Panel, eigenvalues_figure, mode_colours, spectra_figure, trajectories_figure

pytestmark = pytest.mark.usefixtures("rendered_figures")


def growth(rates: list[float], matrix: str = "cross_correlation") -> Panel:
    times = torch.linspace(0, 10, 50, dtype=torch.float64)
    eigenvalues = 1 / (1 + 1e6 * torch.exp(-times[:, None] * torch.tensor(rates, dtype=torch.float64)))
    record = SpectrumRecord.of(times, eigenvalues, 3 - eigenvalues.sum(1), matrix)
    return Panel(record, title="run", step_times=torch.tensor([5.0, np.nan, 7.0]))


def test_trajectories_show_one_line_per_mode_and_one_mark_per_step():
    runs = [growth([8.0, 4, 2]), growth([9.0, 5, 1])]
    figure = trajectories_figure(runs, title="two runs", log_eigenvalues=True)
    upper, lower = figure.axes[0], figure.axes[2]
    curves = [line for line in lower.lines if len(line.get_xdata()) == 49]  # a log axis omits time 0
    np.testing.assert_array_equal([line.get_ydata() for line in curves], runs[0].eigenvalues[1:].T)
    marks = [line.get_xdata()[0] for line in lower.lines if line.get_linestyle() == ":"]
    assert marks == [5, 7] and upper.get_xscale() == "log" and lower.get_yscale() == "log"
    assert upper.get_shared_y_axes().joined(upper, figure.axes[1])


def test_axes_of_negative_losses_show_them():
    positive = growth([8.0, 4, 2])
    record = positive.record
    negative = Panel(SpectrumRecord.of(record.times, record.eigenvalues("cross_correlation"), record.losses - 5))
    for panels in ([positive], [negative], [positive, negative], [negative, positive]):
        axes = trajectories_figure(panels).axes[: len(panels)]  # the losses, on one scale
        lowest = min(float(panel.record.losses.min()) for panel in panels)
        low, high = axes[-1].get_ylim()
        assert low == 0 if lowest >= 0 else low < lowest
        assert high > max(float(panel.record.losses.max()) for panel in panels)


def test_equal_eigenvalues_have_a_range_on_a_log_axis():
    record = SpectrumRecord.of(torch.tensor([0.0, 1, 2]), torch.full((3, 1), 0.2, dtype=torch.float64))
    low, high = trajectories_figure([Panel(record)], log_eigenvalues=True).axes[-1].get_ylim()
    assert low < 0.2 < high


def test_mode_colours_contrast_with_black_dashes():
    """The contrast is at least 3, as WCAG requires for large text."""
    channels = np.array(mode_colours(16))[:, :3]
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (luminance + 0.05).min() / 0.05 >= 3 and (np.diff(luminance) > 0).all()


def test_legend_lists_only_the_line_styles_in_use():
    dotted = growth([8.0, 4, 2])
    crossing = dotted.eigenvalues - 0.01  # negative eigenvalues of C leave gaps on a log axis
    broken = Panel(SpectrumRecord.of(dotted.record.times, torch.tensor(crossing)), step_times=(), theory=dotted.record)
    for panel, expected in (
        (dotted, ["experiment", "detected step"]), (broken, ["experiment", "theory", "gap: eigenvalue below 0"]),
    ):  # fmt: skip
        alone = trajectories_figure([panel], log_eigenvalues=True).axes[0].get_legend()
        shared = eigenvalues_figure([[panel]], [""], title="t", note="n").legends[0]
        assert [text.get_text() for text in alone.get_texts()] == expected
        assert [text.get_text() for text in shared.get_texts()] == expected
        assert shared.get_title().get_text() == "n"


def test_panels_with_same_axes_false_have_separate_axes_and_labels():
    runs = [growth([8.0, 4, 2]), growth([9.0, 5, 1], "covariance")]
    figure = trajectories_figure(runs, title="two losses", same_axes=False)
    assert not figure.axes[0].get_shared_y_axes().joined(figure.axes[0], figure.axes[1])
    assert figure.axes[3].get_ylabel() == "eigenvalues of\nthe covariance"


def test_log_axis_ignores_round_off():
    times = torch.linspace(1, 10, 20)
    modes = torch.stack([torch.linspace(1e-4, 1, 20), torch.full((20,), 1e-17)], dim=1)
    theory = SpectrumRecord.of(times, modes * torch.tensor([1.0, 1e-290]))
    axis = trajectories_figure([Panel(SpectrumRecord.of(times, modes), theory=theory)], log_eigenvalues=True).axes[1]
    low, high = axis.get_ylim()
    assert 1e-5 < low < 1e-4 and 1 < high < 10


def test_same_time_shares_the_time_axis_of_a_column():
    records = [SpectrumRecord.of(torch.linspace(1, end, 20), torch.linspace(0.1, 1, 20)[:, None]) for end in (2, 50)]
    rows = [[Panel(records[0])], [Panel(records[1])]]
    ends = {
        same: [axis.get_xlim()[1] for axis in eigenvalues_figure(rows, ["", ""], "", same_time=same).axes]
        for same in (True, False)
    }
    assert ends == {True: [2, 2], False: [2, 50]}


def test_spectra_figure_draws_the_nearest_measurements():
    run = growth([8.0, 4, 2])
    figure = spectra_figure(run, [0.0, 5.03, 99], title="spectrum")
    first, middle, last = (line.get_ydata() for line in figure.axes[0].lines)
    np.testing.assert_array_equal(first, run.eigenvalues[0])
    np.testing.assert_array_equal(middle, run.eigenvalues[np.abs(run.times - 5.03).argmin()])
    np.testing.assert_array_equal(last, run.eigenvalues[-1])


@pytest.mark.parametrize("shape", [(4, 0), (4, 3)])
def test_empty_and_zero_spectra_are_drawn_without_warning(shape):
    record = SpectrumRecord.of(torch.arange(4.0), torch.zeros(shape), torch.ones(4))
    trajectories_figure(record, title="t", log_eigenvalues=True).savefig(io.BytesIO())


def test_figure_has_a_png_representation():
    """Notebooks display a figure by ``_repr_png_``, with or without pyplot."""
    assert trajectories_figure([growth([8.0, 4, 2])])._repr_png_().startswith(b"\x89PNG")
