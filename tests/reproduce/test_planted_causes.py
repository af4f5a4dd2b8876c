"""Diagnoses of runs with planted causes."""

import pytest

from reproduce.diagnoses import COLUMNS, main


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


def test_table_counts_variants_of_a_cause(tmp_path, capsys):
    table = tmp_path / "table.csv"
    with pytest.raises(SystemExit):
        main(["--table", "--out", str(table)])
    assert f"there is no {table}" in capsys.readouterr().err.splitlines()[-1]
    rows = [
        f"features are equal for all images (constant output),vicreg,photos,0,stuck,{found},0,60,inf,nan"
        for found in ("features are equal for all images", "the learning rate is too low", "unknown")
    ]
    table.write_text("\n".join([",".join(COLUMNS), *rows]))
    main(["--table", "--out", str(table)])
    text = capsys.readouterr().out
    assert "(constant output) | 3 | 1 | 1 × stuck, the learning rate is too low; 1 × stuck, unknown |" in text
