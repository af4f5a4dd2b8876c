"""Confirmation of the primary claims: protocol, resuming, verdicts, intervals and the page."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import reproduce.confirm
import reproduce.evidence
import reproduce.protocol
from reproduce.__main__ import main
from reproduce.claims import worst
from reproduce.figure import Outcome, PaperFigure, run_figure
from reproduce.figures import FIGURES, LONG
from reproduce.networks.training import RunDivergedError, RunFailedError
from reproduce.protocol import Protocol, confirmed_intervals, is_complete, read_records, verdicts
from reproduce.reference import EXPECTED
from stepwise_lightning.errors import UserError

ROOT = Path(__file__).parents[2]
CONTENT = {
    "profile": "cpu", "data_sets": {"photos": 2690}, "min_probability": 0.6, "exclusions": "",
    "claims": [
        {"figure": "tiny", "claim": "small", "relation": "<=", "bound": 1, "control": "twice", "seeds": 8},
        {"figure": "tiny", "claim": "tight", "relation": "<=", "bound": 0.5, "control": "twice", "seeds": 6},
    ],
}  # fmt: skip


class Tiny:
    """A figure whose numbers follow from the index of the seed."""

    def __init__(self):
        self.seeds, self.failure, self.control = [], None, None
        profiles = {"cpu": {"size": 1}, "smoke": {"size": 2}, "full": {}}
        self.figure = PaperFigure("tiny", "A figure.", "None.", profiles, self.produce)

    def produce(self, options, directory):
        (seed,) = options.seeds
        if self.failure is not None and len(self.seeds) == 3:
            failure, self.failure = self.failure, None
            raise failure
        self.seeds.append(seed)
        position = Protocol.read().seeds.index(seed) if seed in Protocol.read().seeds else 3
        value = 0.8 + 0.02 * position
        claims = [
            worst(name, "text", [value], "<=", bound, options.seeds, "twice", [self.control or 2 * value])
            for name, bound in (("small", 1), ("tight", 0.5))
        ]
        return Outcome(Figure(), ["x"], [[1]], claims, [{"run": 1}])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "protocol.json").write_text(json.dumps(CONTENT))
    monkeypatch.setattr(reproduce.protocol, "PROTOCOL", tmp_path / "protocol.json")
    monkeypatch.setattr(reproduce.protocol, "RESULTS", tmp_path / "records")
    monkeypatch.setattr(reproduce.confirm, "load_images", lambda *_: range(2690))
    tiny = Tiny()
    monkeypatch.setitem(FIGURES, "tiny", tiny.figure)
    return tiny


def confirm(tmp_path, *arguments):
    return main(["confirm", "--out", str(tmp_path / "out"), *arguments])


def test_protocol_names_claims_of_figures_with_their_controls():
    protocol = Protocol.read()
    assert {claim.figure for claim in protocol.claims} <= FIGURES.keys() - set(LONG)
    for claim in protocol.claims:
        numbers = json.loads((EXPECTED / f"{claim.figure}.json").read_text(encoding="utf-8"))["numbers"]
        if claim.claim != "barlow_twins_times":  # not in the smoke profile, whose hidden modes hardly grow
            assert claim.claim in numbers
        assert claim.control and claim.seeds >= 10 and claim.relation in ("<=", ">=")


def test_seeds_follow_from_the_text_of_the_protocol(tiny, tmp_path):
    protocol = Protocol.read()
    assert len(set(protocol.seeds)) == 8 and all(1000 <= seed < 1_000_000 for seed in protocol.seeds)
    assert Protocol.read().seeds == protocol.seeds
    assert [protocol.figures(seed) for seed in protocol.seeds] == 8 * [["tiny"]]
    (tmp_path / "protocol.json").write_text(json.dumps(CONTENT) + "\n")
    assert not set(Protocol.read().seeds) & set(protocol.seeds)


def test_interrupted_confirmation_computes_each_seed_once_and_reports_failing_claims(tiny, tmp_path, capsys):
    tiny.failure = KeyboardInterrupt()
    with pytest.raises(SystemExit) as stopped:
        confirm(tmp_path)
    assert stopped.value.code == 130 and "call again to continue" in capsys.readouterr().err
    incomplete = reproduce.evidence.confirmed_section()
    assert "| `tiny`, `small` | 3 of 8 | 3 |" in incomplete and "no verdict" in incomplete
    assert confirm(tmp_path) == 1 and "| confirmed |" in reproduce.evidence.confirmed_section()
    assert tiny.seeds == Protocol.read().seeds
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| `tiny`")]
    assert [(row[2], row[-1]) for row in rows] == [("8 of 8", "confirmed |"), ("0 of 6", "**fails** |")]
    assert rows[0][3] == "0.688" and rows[0][6].startswith("-0.87 [") and rows[0][7] == "0.0078"  # 2/256
    assert confirm(tmp_path) == 1 and len(tiny.seeds) == 8
    record = next((tmp_path / "records" / "photos").glob("*.json")).read_text(encoding="utf-8")
    assert str(tmp_path) not in record and {"commit", "versions", "machine"} <= json.loads(record).keys()
    assert not list((tmp_path / "out").rglob("tiny"))


@pytest.mark.parametrize("error", [UserError, RunDivergedError])
def test_error_of_an_experiment_counts_as_a_violated_bound(error, tiny, tmp_path):
    tiny.failure = error(f"{tmp_path}/out/confirm/photos/seed_{Protocol.read().seeds[3]}/runs/name/log.txt")
    confirm(tmp_path)
    path = tmp_path / "records" / "photos" / f"seed_{Protocol.read().seeds[3]}.json"
    assert json.loads(path.read_text(encoding="utf-8"))["figures"]["tiny"]["error"] == "runs/name/log.txt"
    records = read_records(tmp_path / "records" / "photos", Protocol.read())
    verdict = verdicts(Protocol.read(), records)[0]
    assert verdict.successes == 7 and sum(map(math.isnan, verdict.values)) == 1 and not verdict.confirmed


def test_training_that_fails_for_another_reason_stops_the_confirmation(tiny, tmp_path, capsys):
    tiny.failure = RunFailedError("killed")
    assert confirm(tmp_path) == 2 and capsys.readouterr().err == "error: killed\n" and len(tiny.seeds) == 3


def test_two_processes_share_the_seeds(tiny, tmp_path):
    seed, work = Protocol.read().seeds[3], tmp_path / "out" / "confirm" / "photos"
    work.mkdir(parents=True)
    with reproduce.confirm._locked(work / f"seed_{seed}.lock") as free:
        assert free and confirm(tmp_path) == 75  # the other process still computes this seed
        assert seed not in tiny.seeds and len(tiny.seeds) == 7
    assert confirm(tmp_path) == 1 and tiny.seeds[7:] == [seed]


def test_records_of_a_changed_protocol_are_ignored(tiny, tmp_path, capsys):
    confirm(tmp_path)
    (tmp_path / "protocol.json").write_text(json.dumps(CONTENT) + "\n")
    assert not is_complete(Protocol.read(), read_records(tmp_path / "records" / "photos", Protocol.read()))
    capsys.readouterr()
    confirm(tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "8 records in" in error and "another protocol" in error
    assert len(set(tiny.seeds)) == 16


def test_changed_figure_or_data_is_refused_in_one_line(tiny, tmp_path, capsys):
    claims = [CONTENT["claims"][0] | {"control": "thrice"}]
    (tmp_path / "protocol.json").write_text(json.dumps(CONTENT | {"claims": claims}))
    assert confirm(tmp_path) == 2 and "'thrice'" in capsys.readouterr().err
    assert confirm(tmp_path, "--data", "stl10") == 2 and "choose --data from photos" in capsys.readouterr().err
    (tmp_path / "protocol.json").write_text(json.dumps(CONTENT | {"data_sets": {"photos": 9}}))
    assert confirm(tmp_path) == 2 and "2690 images, and the protocol 9" in capsys.readouterr().err
    assert not list(tmp_path.rglob("seed_*.json"))


def test_other_profiles_leave_the_stored_records_alone(tiny, tmp_path):
    assert confirm(tmp_path, "--profile", "smoke") == 1
    assert not list(tmp_path.glob("records/*/*")) and len(list(tmp_path.glob("out/confirm/photos/*.json"))) == 8


def test_confirmed_claims_of_a_new_run_are_judged_by_their_interval(tiny, tmp_path, capsys):
    confirm(tmp_path)
    arguments = ["--out", str(tmp_path / "figures")]
    assert run_figure(tiny.figure, arguments) == 1
    small, tight = json.loads((tmp_path / "figures" / "tiny" / "claims.json").read_text(encoding="utf-8"))["claims"]
    assert small["holds"] and small["interval"] == pytest.approx([0.7224, 1.0176], abs=1e-4)
    assert not tight["holds"] and tight["interval"] == []  # not confirmed: the bound decides
    assert "(in 0.7224 to 1.018; twice: 1.72)" in capsys.readouterr().out
    run_figure(tiny.figure, [*arguments, "--profile", "smoke"])  # other settings
    assert "(<= 1; twice: 1.72)" in capsys.readouterr().out


def test_interval_that_contains_the_control_is_not_used(tiny, tmp_path):
    tiny.control = 1.01
    confirm(tmp_path)
    (verdict, _) = verdicts(Protocol.read(), read_records(tmp_path / "records" / "photos", Protocol.read()))
    assert verdict.confirmed and confirmed_intervals("tiny", "photos", {"profile": "cpu", "size": 1}) == {}


def test_page_contains_the_tables_of_the_stored_records():
    assert reproduce.evidence.confirmed_section() in reproduce.evidence.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_killed_confirmation_of_a_linear_model_continues(tmp_path):
    claims = [{"figure": "linear_model", "claim": "crossed", "relation": "<=", "bound": 0.01, "seeds": 2,
               "control": "theory without pairs"}]  # fmt: skip
    (tmp_path / "protocol.json").write_text(json.dumps(CONTENT | {"claims": claims}))
    script = (
        "import sys, pathlib, reproduce.protocol; reproduce.protocol.PROTOCOL = pathlib.Path('protocol.json'); "
        "from reproduce.__main__ import main; sys.exit(main(['confirm', '--profile', 'smoke', '--out', '.']))"
    )
    command, records = [sys.executable, "-c", script], tmp_path / "confirm" / "photos"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (first := list(records.glob("seed_*.json"))):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    text = first[0].read_text(encoding="utf-8")
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 1 and "| 2 of 2 | 0.224 |" in finished.stdout  # two seeds confirm nothing
    assert first[0].read_text(encoding="utf-8") == text and len(list(records.glob("seed_*.json"))) == 2
    assert not [path for path in records.iterdir() if path.is_dir()]
