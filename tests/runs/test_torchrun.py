"""The job script for torchrun in ``docs/clusters.md``: a signal saves a checkpoint, and the status is 75."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_runs import changed, write_images

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_job_script_passes_signals_on(number, tmp_path):
    blocks = (ROOT / "docs/clusters.md").read_text(encoding="utf-8").split("```sh\n")
    script = next(block for block in blocks if block.startswith("trap ")).partition("```")[0]
    write_images(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changed({"trainer.max_steps": 1_000_000})))
    (tmp_path / "job.sh").write_text(
        script.replace("configs/barlow_twins_photos.yaml", "mine.yaml").replace(
            ".venv/bin/torchrun", f"{sys.executable} -m torch.distributed.run --standalone"
        )
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=variables, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("spectrum.csv")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    job.send_signal(number)
    assert job.wait(60) == 75, log.read_text()
    assert "stopped by a signal: saved at step" in log.read_text() and list(tmp_path.rglob("last.ckpt"))
