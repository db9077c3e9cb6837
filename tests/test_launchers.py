"""The launch scripts: valid shell, the command line that results, one clear line for bad input."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("NODES", "RANKS", "ENDPOINT", "JOB", "RESTARTS", "HOURS", "TRAIN")
    own = {key: value for key, value in os.environ.items() if key not in names}
    command = ["bash", str(SCRIPTS / "launch_torchrun.sh"), *arguments]
    own |= {"PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=own, timeout=60)


@pytest.mark.parametrize("name", ["launch_torchrun.sh", "launch_slurm.sh"])
def test_is_valid_shell_and_executable(name: str) -> None:
    path = SCRIPTS / name
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert os.access(path, os.X_OK)


def test_the_command_line_that_results() -> None:
    done = launch(
        "--dry-run", "my recipe.yaml", "--set", "a=1",
        NODES="2", RANKS="4", ENDPOINT="first:1234", JOB="x", HOURS="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = ["timeout", "--kill-after=120", "2h", sys.executable, "-m", "torch.distributed.run"]
    expected += ["--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend", "c10d"]
    expected += ["--rdzv-endpoint", "first:1234", "--rdzv-id", "x", "--max-restarts", "3"]
    expected += ["-m", "dvpa", "train", "my recipe.yaml", "--set", "a=1"]
    assert shlex.split(done.stdout) == expected


def test_bad_input_is_one_line_or_the_usage() -> None:
    done = launch("--dry-run", "r.yaml", RANKS="many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch_torchrun: RANKS=many must be a whole number\n"
    assert launch().returncode == 2 and "RECIPE.yaml" in launch().stderr
    slurm = subprocess.run(["bash", str(SCRIPTS / "launch_slurm.sh")], capture_output=True)
    assert slurm.returncode == 2


@pytest.mark.slow
def test_every_rank_runs(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n"
    )
    done = launch(str(tmp_path), RANKS="2", ENDPOINT="127.0.0.1:29477", TRAIN=str(script))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
