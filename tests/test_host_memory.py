"""Runs that cannot fit into memory, and the end of a run that leaves the calibration out."""

from pathlib import Path

import pytest
import torch
from finetune_world import conversations, random_start, recipe_for
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa_train import host_memory
from dvpa_train.config import Recipe, load_recipe
from dvpa_train.host_memory import check_host_memory, host_bytes
from dvpa_train.main import run_recipe
from dvpa_train.processes import Processes

FEW = [f"stages.{name}.steps=2" for name in ("foundation", "grow", "joint")]


def whole_bytes(recipe: Recipe) -> int:
    priced = price(recipe.model_config())
    return 4 * (priced.total_params + priced.mtp_params)


@pytest.mark.parametrize(
    ("overrides", "local_size", "times", "message"),
    [
        (["strategy.kind=ddp"], 8, 8, "strategy.kind: ddp has the whole model in the memory of ev"),
        (["strategy.kind=deepspeed"], 2, 2, "strategy.kind: deepspeed has the whole model"),
        ([], 1, 1, "strategy.kind: single has the whole model"),
        (["strategy.kind=fsdp2"], 8, 1, "calibration: .* whole model in its memory, .*=null"),
        (["strategy.kind=fsdp2", "calibration=null"], 8, 0, ""),
    ],
)
def test_a_model_that_cannot_fit_is_refused(
    overrides: list[str], local_size: int, times: int, message: str
) -> None:
    recipe = load_recipe("train/pico.yaml", overrides)
    among, needed = Processes(0, local_size, local_size), times * whole_bytes(recipe)
    check_host_memory(recipe, among, needed)
    if times:
        with pytest.raises(ValueError, match=message) as error:
            check_host_memory(recipe, among, needed - 1)
        assert "\n" not in str(error.value)


def test_only_the_first_process_needs_the_whole_model() -> None:
    recipe = load_recipe("train/pico.yaml", ["strategy.kind=fsdp2"])
    check_host_memory(recipe, Processes(1, 8, 8), 1)


def test_a_run_is_refused_before_it_leaves_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"which has 0\.0 GB; use fsdp2"):
        run_recipe(load_recipe("train/pico.yaml"), tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/job/step", "job/memory.max"),
        ("0::/job/step", "job/step/memory.max"),
        ("4:memory:/job", "memory/job/memory.limit_in_bytes"),
        ("11:cpu,memory:/", "memory/memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_control_group_counts(
    line: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlimited = host_bytes()
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/\n{line}\n")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "OWN_GROUPS", own)
    path.write_text("4096000\n")
    assert host_bytes() == 4_096_000
    path.write_text("max\n")
    assert host_bytes() >= unlimited


@pytest.mark.slow
def test_without_calibration_a_run_ends_with_its_stages_and_can_be_finished_later(
    tmp_path: Path,
) -> None:
    """The later start only fits head and tier map; the result is that of a run in one go."""
    stages_only = load_recipe("train/pico.yaml", [*FEW, "calibration=null"])
    whole = load_recipe("train/pico.yaml", FEW)
    assert run_recipe(stages_only, tmp_path / "run", Console(quiet=True)) is None
    checkpoint = tmp_path / "run" / "checkpoint"
    model = DvpaForCausalLM.from_pretrained(checkpoint)
    assert model.difficulty_head is None and not model.tier_map.is_fitted
    assert model(torch.arange(3, 9)[None]).tiers.tolist() == [model.tier_map.default_tier]
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == model.config.vocab_size
    stage = tmp_path / "run" / "training_state" / "2-joint" / "model"
    assert (checkpoint / "model.safetensors").samefile(stage / "model.safetensors")
    assert not (checkpoint / "config.json").samefile(stage / "config.json")

    finished = run_recipe(whole, tmp_path / "run", Console(quiet=True))
    in_one_go = run_recipe(whole, tmp_path / "other", Console(quiet=True))
    assert finished is not None and in_one_go is not None
    assert finished.model.tier_map == in_one_go.model.tier_map
    ours, theirs = (load_file(r.checkpoint / "model.safetensors") for r in (finished, in_one_go))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_file(stage / "model.safetensors").keys() < ours.keys(), "the stage's is as it was"


def test_adapters_are_merged_all_the_same(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra `lora`)")
    start = random_start(tmp_path / "start")
    chats = conversations(tmp_path / "chats.jsonl")
    recipe = recipe_for(start, chats, "calibration=null")
    assert run_recipe(recipe, tmp_path / "run", Console(quiet=True)) is None
    before = load_file(start / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert after.keys() == {name for name in before if not name.startswith("difficulty_head.")}
    assert any(not torch.equal(after[name], before[name]) for name in after)
