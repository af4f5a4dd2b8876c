"""The example with lightly in the tutorial on custom modules runs, for two steps."""

import re
from pathlib import Path

import pytest
from attached import write_photographs

from stepwise_lightning import SpectrumRecord

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "own_module.md"


@pytest.mark.filterwarnings("default")  # third-party warnings do not concern the reader
def test_simclr_of_lightly_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for setting, fewer in (("max_steps=150", "max_steps=2"), ("batch_size=32", "batch_size=4")):
        assert setting in code
        code = code.replace(setting, fewer)
    write_photographs(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, PAGE.name, "exec"), {"__name__": PAGE.stem})
    assert "modes learned" in capsys.readouterr().out
    assert SpectrumRecord.load("runs/lightly_simclr/version_0").steps.tolist() == [0, 1, 2]
