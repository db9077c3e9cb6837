"""Two nodes on one machine, one of them lost and found again: the run is the same.

Needs root, for network namespaces; see scripts/rehearse_nodes.py.
DVPA_NODE_EVENTS: how the node is lost (default cut; the full rehearsal is cut,kill).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from train_world import PATIENCE_S, environment

from dvpa_train.config import StrategyConfig
from dvpa_train.processes import processes

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
rehearse_nodes = import_module("rehearse_nodes")
two_nodes = import_module("two_nodes")

EVENTS = os.environ.get("DVPA_NODE_EVENTS", "cut").split(",")
# pico with fewer questions to score; every stage is there.
SETTINGS = ("difficulty.items=30", "difficulty.steps=2", "calibration.items=30")
# A checkpoint is whole before the next is begun: at step 7 there is one.
SETTINGS += ("checkpoint_every=3",)
AT, CHECKPOINTS = "joint/7", (3, 6, 9)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    reason = two_nodes.why_not()
    if reason:
        pytest.skip(f"no two nodes on this machine: {reason}")
    with two_nodes.two_nodes() as made:
        yield made
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in left for name in made.names)


@pytest.fixture(scope="module")
def unbroken(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on both nodes that nothing happens to."""
    plan = rehearse_nodes.Plan(settings=SETTINGS)
    folder = tmp_path_factory.mktemp("unbroken")
    return rehearse_nodes.run(nodes, plan, folder, eventful=False)


def test_a_comparison_finds_one_bit_one_step_and_one_file() -> None:
    steps = {("joint", 0): ("0.1", "1.0"), ("joint", 1): ("0.2", "1.0")}
    files = {"outcomes/test.jsonl": "a", "checkpoint/model.safetensors": "b"}
    one = rehearse_nodes.Finished(1.0, steps, files)
    assert rehearse_nodes.differences(one, one) == []
    turned = steps | {("joint", 1): ("0.20000000000000004", "1.0")}
    (bit,) = rehearse_nodes.differences(one, rehearse_nodes.Finished(1.0, turned, files))
    assert bit.startswith("joint step 1: 0.20000000000000004")
    step = {("joint", 0): steps["joint", 0]}
    assert len(rehearse_nodes.differences(one, rehearse_nodes.Finished(1.0, step, files))) == 1
    file = {"outcomes/test.jsonl": "a"}
    other = rehearse_nodes.Finished(1.0, steps, file)
    assert rehearse_nodes.differences(one, other) == ["checkpoint/model.safetensors"]


def test_the_log_tells_which_steps_were_taken(tmp_path: Path) -> None:
    assert rehearse_nodes.logged(tmp_path) == {}
    (tmp_path / "logs").mkdir()
    rows = "step,stage_name,loss,gradient_norm\n12,grow,1,2\n13,grow,5,6\n18,joint,7,8\n19,joi"
    (tmp_path / "logs" / "metrics.csv").write_text(rows)  # the last line is being written
    steps = rehearse_nodes.logged(tmp_path)
    assert steps == {("grow", 12): ("1", "2"), ("grow", 13): ("5", "6"), ("joint", 18): ("7", "8")}
    assert rehearse_nodes.is_taken(tmp_path, "grow/2")
    assert not rehearse_nodes.is_taken(tmp_path, "grow/3")


def test_several_nodes_are_refused_a_store_that_outlives_a_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launcher = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (launcher | {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        processes(StrategyConfig(kind="ddp")),
    ):
        pass


ANOTHER_GROUP = """
import os, time, torch, torch.distributed as dist
from dvpa_train.config import StrategyConfig
from dvpa_train.processes import limit_waits, processes

with processes(StrategyConfig(kind="ddp", timeout_s=60)) as among:
    group = dist.new_group()
    dist.all_reduce(torch.ones(1), group=group)
    among.barrier()
    limit_waits(4)
    if among.is_first:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(1)
    time.sleep(120)  # lost, to the first process
"""


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from two_nodes import two_nodes
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under `nohup ... &`
with two_nodes() as nodes:
    nodes.start(1, ["sleep", "600"], dict(os.environ), Path(sys.argv[1]))
    print(*nodes.names, nodes.processes[1].pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_nodes_that_are_stopped(signum: signal.Signals, tmp_path: Path) -> None:
    if reason := two_nodes.why_not():
        pytest.skip(f"no two nodes on this machine: {reason}")
    running = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path / "log")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    *names, pid = running.stdout.readline().split()
    assert len(names) == 2 and Path("/proc", pid).exists()
    running.send_signal(signum)
    assert "KeyboardInterrupt" in running.communicate(timeout=PATIENCE_S)[1]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in left for name in names)
    assert not Path("/proc", pid).exists()


@pytest.mark.slow
def test_waits_end_in_groups_that_others_make(tmp_path: Path) -> None:
    """As device meshes and DeepSpeed make them: for 30 minutes, if nothing is done about it."""
    script = tmp_path / "another_group.py"
    script.write_text(ANOTHER_GROUP)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert "Timed out waiting 4000ms" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.rehearsal
@pytest.mark.parametrize("event", EVENTS)
def test_a_node_is_lost_and_comes_back(
    event: str, nodes: Any, unbroken: Any, tmp_path: Path
) -> None:
    plan = rehearse_nodes.Plan(event, at=AT, settings=SETTINGS)
    found = rehearse_nodes.run(nodes, plan, tmp_path, eventful=True)
    print(rehearse_nodes.report(plan, unbroken, found))
    assert len(unbroken.steps) == 30 and unbroken.files.keys() >= {"checkpoint/model.safetensors"}
    assert rehearse_nodes.differences(unbroken, found) == []
    stage, step = next((stage, step) for when, stage, step in found.resumed if when > 0)
    assert stage == "joint" and step in CHECKPOINTS
    if event == "cut":
        assert found.noticed.keys() == {0, 1}, "neither waits for ever"
        assert found.relaunched == [], "the launchers meet again by themselves"
    else:
        assert [node for _, node in found.relaunched] == [1], "the other launcher waits for it"
