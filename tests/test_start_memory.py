"""The memory of each process at the start of a stage: its slices and little more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from train_world import HERE, environment, torchrun

RANKS = 4
REST = 32_000_000  # of Python, PyTorch and the process groups


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_takes_its_slices_and_at_most_one_tensor(tmp_path: Path) -> None:
    """Drawn, and grown from a checkpoint; a whole model on each takes several times as much."""
    done = subprocess.run(
        [*torchrun(RANKS), str(HERE / "start_worker.py"), str(tmp_path)],
        # What is freed goes back at once, or an earlier way would pay for a later one.
        env=environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["held"] < found["model"] / 3
        limit = found["held"] + found["largest"] + REST
        assert limit < found["model"]
        assert found["drawn"] < limit and found["grown"] < limit, found
        assert found["whole"] > found["model"], found
