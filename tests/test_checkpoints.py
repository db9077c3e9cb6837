"""Sealed checkpoints, refused steps, and which examples a process reads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from dvpa_train.batches import Part
from dvpa_train.checkpoints import MANIFEST, SEAL, describe, find_latest, seal
from dvpa_train.config import GuardConfig, StageConfig, load_recipe
from dvpa_train.examples import BatchDataset
from dvpa_train.guard import Guard, RefusedStep
from dvpa_train.main import run_recipe
from dvpa_train.module import TierModule
from dvpa_train.processes import Processes
from dvpa_train.sharding import clip_gradients

FACTS = {"recipe": "abc", "tokenizer": "def"}


def sealed(stage: Path, step: int) -> Path:
    """A checkpoint of two processes."""
    folder = stage / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    for rank in range(2):
        path = folder / f"__{rank}_0.distcp"
        path.write_bytes(bytes([rank, step]) * 100)
        (folder / SEAL.format(rank)).write_text(json.dumps(describe(folder, [path])))
    seal(folder, {"step": step, **FACTS}, 2, timeout_s=10.0)
    return folder


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_latest(tmp_path, FACTS, Processes()) == (None, [])
    sealed(tmp_path, 5)
    newest = sealed(tmp_path, 10)
    found, passed_over = find_latest(tmp_path, FACTS, Processes())
    assert found is not None and found.folder == newest and found.step == 10
    assert passed_over == []
    assert not list(newest.glob(".*"))  # nothing is left of the sealing


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: (f / MANIFEST).unlink(), "not complete"),
        (lambda f: (f / MANIFEST).write_text("{"), "not complete"),
        (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp: missing"),
        (lambda f: (f / "__1_0.distcp").write_bytes(b"x"), "1 bytes, 200 were written"),
        (lambda f: (f / "__0_0.distcp").write_bytes(b"x" * 200), "SHA-256"),
    ],
)
def test_a_harmed_checkpoint_is_passed_over_and_said_so(
    harm: Any, problem: str, tmp_path: Path
) -> None:
    older, newest = sealed(tmp_path, 5), sealed(tmp_path, 10)
    harm(newest)
    found, passed_over = find_latest(tmp_path, FACTS, Processes())
    assert found is not None and found.folder == older
    assert len(passed_over) == 1
    assert passed_over[0].startswith("step-00000010: ") and problem in passed_over[0]


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    sealed(tmp_path, 5)
    with pytest.raises(ValueError, match="tokenizer: 'def' when it was saved, 'other' now"):
        find_latest(tmp_path, {**FACTS, "tokenizer": "other"}, Processes())


def test_a_process_that_never_writes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / SEAL.format(0)).write_text("{}")
    with pytest.raises(TimeoutError, match="seal-1"):
        seal(folder, {}, 2, timeout_s=0.05)
    assert not (folder / MANIFEST).exists()


# -- refused steps ------------------------------------------------------------------------------


def test_a_jump_is_seen_once_enough_steps_are_known() -> None:
    guard = Guard(GuardConfig(spike_factor=2.0, window=3))
    guard.check(0, 100.0)
    for step, loss in enumerate((4.0, 3.0, 3.5), 1):
        guard.check(step, loss)
    with pytest.raises(RefusedStep, match=r"step 9: the loss is 7.5, usually 3.5"):
        guard.check(9, 7.5)
    guard.check(10, 6.9)
    for loss in (math.nan, math.inf):
        with pytest.raises(RefusedStep):
            guard.check(11, loss)
        with pytest.raises(RefusedStep, match="gradient"):
            guard.check_gradient(11, loss)


def test_a_run_goes_back_and_round_a_bad_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 8 of the last stage gives NaN: the stage ends without it, and says so."""
    step = TierModule.training_step
    taken: list[int] = []

    def poisoned(self: TierModule, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = step(self, batch, index)
        if self.stage.name != "joint":
            return loss
        taken.append(self.global_step)
        bad = self.global_step == 8 and taken.count(8) == 1
        if bad:
            assert self._sums is not None
            self._sums.values[-1] = math.nan
        return loss * (math.nan if bad else 1.0)

    monkeypatch.setattr(TierModule, "training_step", poisoned)
    run_recipe(load_recipe("train/pico.yaml"), tmp_path, Console(quiet=True))
    assert taken == [*range(9), *range(5, 12)]  # back to the checkpoint of step 5
    done = json.loads((tmp_path / "training_state" / "2-joint" / "done.json").read_text())
    assert done["skipped"] == [8] and done["steps"] == 12


def test_a_run_that_never_recovers_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TierModule.training_step

    def poisoned(self: TierModule, batch: dict[str, Tensor], index: int) -> Tensor:
        return step(self, batch, index) * math.nan

    monkeypatch.setattr(TierModule, "training_step", poisoned)
    recipe = load_recipe("train/pico.yaml", ["guard.max_rollbacks=1"])
    with pytest.raises(RuntimeError, match=r"gradient norm is nan; 1 batches have been left out"):
        run_recipe(recipe, tmp_path, Console(quiet=True))


# -- who reads what -----------------------------------------------------------------------------


class Numbers:
    """A source whose examples are their numbers."""

    def train_batch(self, start: int, stop: int, level_weights: Any = ()) -> list[Any]:
        return list(range(start, stop))


@given(
    size=st.sampled_from([1, 2, 4]),
    accumulate=st.sampled_from([1, 2, 3]),
    skipped=st.sets(st.integers(0, 6), max_size=3),
    first=st.integers(0, 50),
)
def test_any_number_of_processes_reads_the_same_batches(
    size: int, accumulate: int, skipped: set[int], first: int
) -> None:
    stage = StageConfig("s", "joint", 1, steps=4, batch_size=24)
    source: Any = Numbers()
    numbers = [n for n in range(20) if n not in skipped][: stage.steps]
    for step, number in enumerate(numbers):
        read = []
        for micro in range(accumulate):
            for rank in range(size):
                part = Part(rank, size)
                data = BatchDataset(source, stage, first, part, accumulate, sorted(skipped))
                own, of_step = data[step * accumulate + micro]
                assert set(own) <= set(of_step)
                if micro == 0:  # which is asked for the step's labels
                    assert len(set(of_step)) == len(of_step) == 24 // size
                read += own
        start = first + 24 * number
        assert read == list(range(start, start + 24))


def test_a_batch_that_does_not_divide_is_one_error() -> None:
    stage = StageConfig("s", "joint", 1, steps=4, batch_size=10)
    source: Any = Numbers()
    with pytest.raises(ValueError, match=r"stages.s.batch_size: 10 must be a multiple of 4"):
        BatchDataset(source, stage, 0, Part(0, 2), 2)


@given(limit=st.floats(0.01, 10), seed=st.integers(0, 9))
def test_clipping_is_pytorchs(limit: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = ([nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))] for _ in "ab")
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    norm = clip_gradients(ours, limit, Processes())
    expected = nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close(norm, expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.kind=fsdp3", "kind"),
        ("strategy.expert_parallel=2", "needs kind fsdp2"),
        ("strategy={kind: deepspeed, zero_stage: 3, expert_parallel: 2}", "needs kind fsdp2"),
        ("strategy={kind: fsdp2, expert_parallel: 3}", "must divide the 2 experts of a group"),
        ("strategy.precision=bf16", "needs kind fsdp2 or deepspeed"),
        ("strategy.accumulate=0", "accumulate"),
        ("strategy.offload_optimizer=true", "needs kind deepspeed"),
        ("guard.spike_factor=0.5", "spike_factor"),
        ("keep_checkpoints=0", "keep_checkpoints"),
    ],
)
def test_what_a_strategy_cannot_do_is_one_error(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe("train/pico.yaml", [override])
    assert "\n" not in str(error.value)


def test_processes_that_do_not_fit_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvpa_train.processes import check_size

    config = load_recipe("train/pico.yaml").strategy
    with pytest.raises(ValueError, match="single is for one process, and 2 were started"):
        check_size(config, 2)
    with pytest.raises(ValueError, match="2 must divide the 3 processes"):
        check_size(replace(config, kind="fsdp2", expert_parallel=2), 3)
