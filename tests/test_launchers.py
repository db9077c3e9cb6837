"""The launch scripts: valid shell, the command line that results, one clear line for bad input."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
# In place of SLURM's commands and of Python: they write down how they were called.
SRUN = """
echo "srun $*" >> calls
case "$*" in *pkill*) touch told; exit 0 ;; esac
while [ "${1#--}" != "$1" ]; do shift; done
SLURMD_NODENAME=node9 exec "$@"
"""
SCONTROL = """
echo "scontrol $*" >> calls
if [ "$1" = show ]; then printf 'node9\\nnode10\\n'; fi
"""
PYTHON = """
echo "$*" >> launched
while [ -n "${UNTIL_TOLD:-}" ] && [ ! -e told ]; do sleep 0.05; done
exit "${CODE:-0}"
"""


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("NODES", "RANKS", "ENDPOINT", "ADDRESS", "JOB", "RESTARTS", "OUTAGE", "HOURS", "TRAIN")
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
    expected = ["timeout", "--kill-after=120", "2h", "env", OWN_STORE, sys.executable]
    expected += ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "4"]
    expected += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "first:1234", "--rdzv-id", "x"]
    expected += ["--rdzv-conf", "read_timeout=1800,join_timeout=1800", "--max-restarts", "3"]
    expected += ["-m", "dvpa", "train", "my recipe.yaml", "--set", "a=1"]
    assert shlex.split(done.stdout) == expected


@pytest.mark.parametrize(("address", "is_host"), [("10.0.0.1", 1), ("10.0.0.11", 0)])
def test_the_node_that_the_endpoint_names_keeps_the_store(address: str, is_host: int) -> None:
    done = launch(
        "--dry-run", "r.yaml", NODES="2", ENDPOINT="10.0.0.1:29400", ADDRESS=address, OUTAGE="90"
    )
    words = shlex.split(done.stdout)
    settings = f"read_timeout=90,join_timeout=90,is_host={is_host}"
    assert words[words.index("--rdzv-conf") + 1] == settings
    assert words[words.index("--local-addr") + 1] == address


def test_bad_input_is_one_line_or_the_usage() -> None:
    done = launch("--dry-run", "r.yaml", RANKS="many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch_torchrun: RANKS=many must be a whole number\n"
    assert launch().returncode == 2 and "RECIPE.yaml" in launch().stderr
    slurm = subprocess.run(["bash", str(SCRIPTS / "launch_slurm.sh")], capture_output=True)
    assert slurm.returncode == 2


def slurm_job(folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """launch_slurm.sh as `sbatch` would run it on two nodes; only its own part is real."""
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash{body}")
        path.chmod(0o755)
    job = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "USER": "me",
        "DVPA_HOME": str(SCRIPTS.parent),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[9-10]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(SCRIPTS / "launch_slurm.sh"), "r.yaml", "--set", "a=1"]
    return subprocess.Popen(command, cwd=folder, env=job | environment, text=True)


def test_slurm_starts_a_launcher_on_each_node_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    assert slurm_job(tmp_path, CODE="3").wait(timeout=60) == 3
    words = (tmp_path / "launched").read_text().split()
    told = {name: words[words.index(f"--{name}") + 1] for name in ("nnodes", "nproc-per-node")}
    assert told == {"nnodes": "2", "nproc-per-node": "4"}
    # By name, not by number: as torchrun orders the nodes.
    assert words[words.index("--rdzv-endpoint") + 1] == "node10:29400"
    assert words[words.index("--rdzv-id") + 1] == "dvpa-7-0"
    assert words[words.index("--local-addr") + 1] == "node9"
    assert words[words.index("--rdzv-conf") + 1].endswith(",is_host=0")
    assert words[-6:] == ["-m", "dvpa", "train", "r.yaml", "--set", "a=1"]
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_slurm_tells_the_trainers_before_the_limit_and_requeues(tmp_path: Path) -> None:
    job = slurm_job(tmp_path, UNTIL_TOLD="1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "launched").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-1] == "scontrol requeue 7"
    (told,) = (call for call in calls if "pkill" in call)
    assert "--overlap --ntasks-per-node=1 pkill -USR1 -u me -f" in told
    pattern = told.partition(" -f ")[2]
    trainer = f"{sys.executable} -u -m dvpa train r.yaml"
    launcher = f"{sys.executable} -m torch.distributed.run --nnodes 2 -m dvpa train r.yaml"
    assert re.search(pattern, trainer)
    assert not re.search(pattern, launcher)
    assert not re.search(pattern, f"bash {SCRIPTS}/launch_torchrun.sh r.yaml")


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
