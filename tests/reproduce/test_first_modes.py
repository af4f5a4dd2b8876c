"""Measured and forecast first modes of losses given as functions."""

import csv

import pytest

from reproduce.first_modes import COLUMNS, main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_first_mode_of_a_function_is_learned_at_the_forecast_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["spectral_contrastive", "--seeds", "0", "--out", "table.csv"])
    with open("table.csv", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert header == COLUMNS and row[:3] == ["spectral_contrastive", "photos", "0"]
    assert abs(float(row[-1])) < 0.08 and float(row[-2]) > 20
    assert "median error of the first mode's step" in capsys.readouterr().out
