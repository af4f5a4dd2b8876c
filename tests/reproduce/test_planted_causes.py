"""Diagnoses of runs with planted causes."""

import pytest

from reproduce.diagnoses import main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_planted_cause_is_found_and_counted(tmp_path, capsys):
    table = str(tmp_path / "table.csv")
    for cause in ("features are equal for all images", "no mode can grow"):
        main(["--seeds", "0", "--causes", cause, "--out", table])
    capsys.readouterr()
    main(["--table", "--out", table])
    lines = capsys.readouterr().out
    assert "| features are equal for all images | 3 | 3 |  |" in lines and "| no mode can grow | 2 | 2 |  |" in lines
    assert "100% of 5 planted causes are found." in lines
