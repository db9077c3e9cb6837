"""Processes that die, are told to stop, or come back in another number: the run is the same.

DVPA_KILL_TRIALS: how many random kills (default 1; the full rehearsal is 10).
"""

import os
import random
from pathlib import Path

import pytest
from train_world import Trained, train, two_experts

EXPERTS = ("strategy.kind=fsdp2", "strategy.expert_parallel=2", "strategy.timeout_s=60")
TRIALS = int(os.environ.get("DVPA_KILL_TRIALS", "1"))
STEPS = {"foundation": 12, "grow": 6, "joint": 12}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two processes that nothing happens to."""
    return train(tmp_path_factory.mktemp("unbroken") / "run", 2, *EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_kill_minus_nine_of_any_process_changes_no_bit(
    trial: int, unbroken: Trained, tmp_path: Path
) -> None:
    draws = random.Random(f"kill {trial}")
    stage = draws.choice(list(STEPS))
    rank, step = draws.randrange(2), draws.randrange(STEPS[stage])
    found = train(
        tmp_path / "run", 2, *EXPERTS, restarts=5, DVPA_TEST_KILL=f"{rank}:{stage}/{step}"
    )
    assert (tmp_path / "run.killed").exists(), "the kill took place"
    assert found.last_steps == unbroken.last_steps


@pytest.mark.slow
def test_two_then_four_then_one_process(tmp_path: Path) -> None:
    """Stopped twice by request; the data order goes on, and the losses to 1e-5."""
    kind = ("strategy.kind=fsdp2", two_experts(tmp_path))
    alone = train(tmp_path / "alone", 1, *kind)
    run = tmp_path / "run"
    train(run, 2, *kind, DVPA_TEST_STOP="foundation/6")
    train(run, 4, *kind, DVPA_TEST_STOP="joint/3")
    found = train(run, 1, *kind)
    assert [step[:2] for step in found.steps] == [step[:2] for step in alone.steps]
    assert found.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.rehearsal), 3])
def test_deepspeed_resumes_on_as_many_processes_and_no_others(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    kind = ("strategy.kind=deepspeed", f"strategy.zero_stage={stage}")
    unbroken = train(tmp_path / "unbroken", 2, *kind)
    run = tmp_path / "run"
    train(run, 2, *kind, DVPA_TEST_STOP="joint/6")
    with pytest.raises(AssertionError, match="processes: 2 when it was saved, 4 now"):
        train(run, 4, *kind)
    found = train(run, 2, *kind)
    assert [step[:3] for step in found.steps] == [step[:3] for step in unbroken.steps]
