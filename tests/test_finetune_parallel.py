"""Fine-tuning on several processes takes the steps of one: adapters, frozen parts and teachers."""

import json
from pathlib import Path

import pytest
import torch
from finetune_world import RECIPE, conversations, cut_down, random_start
from safetensors.torch import load_file
from train_world import Trained, train

SAME = 1e-5
STAGES_ONLY = "calibration=null"
FULL = (
    "lora=null",
    "freeze=[router, experts]",
    "stages=[{name: near, kind: joint, num_tiers: 3, steps: 4, batch_size: 8, "
    "distillation: 0.5, teacher: frozen, distill_top: true}, "
    "{name: far, kind: joint, num_tiers: 3, steps: 4, batch_size: 8}]",
)
LORA = ("lora.targets=[attention, experts]",)
GROUPS = ("lora.targets=[experts]", "lora.groups=[1, 3]", "stages.joint.teacher=in_place")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A starting checkpoint and conversations, as overrides."""
    folder = tmp_path_factory.mktemp("world")
    start = random_start(folder / "checkpoint")
    return [*cut_down(start, conversations(folder / "chats.jsonl")), STAGES_ONLY]


def tune(world: list[str], out: Path, ranks: int, *overrides: str) -> Trained:
    return train(out, ranks, *world, *overrides, recipe=RECIPE)


def check_equal(found: Trained, expected: Trained) -> None:
    """Losses, cost, and the checkpoint that is left."""
    assert found.losses == pytest.approx(expected.losses, rel=SAME)
    assert len(found.losses) >= 6
    for done in expected.out.glob("training_state/*/done.json"):
        one, other = (
            json.loads((run.out / done.relative_to(expected.out)).read_text())
            for run in (found, expected)
        )
        assert one["training_flops"] == other["training_flops"]
    folders = (run.out / "checkpoint" for run in (found, expected))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-3, msg=name)
    config = json.loads((found.out / "checkpoint" / "config.json").read_text())
    assert not config.get("difficulty")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        pytest.param(LORA, ["ddp"], id="lora"),
        pytest.param(GROUPS, ["ddp accumulate=2"], marks=pytest.mark.rehearsal, id="groups"),
        pytest.param(FULL, ["ddp", "fsdp2 loss_chunk=7", "fsdp2 expert_parallel=2"], id="full"),
    ],
)
def test_it_takes_the_steps_of_one_process(
    options: tuple[str, ...], kinds: list[str], world: list[str], tmp_path: Path
) -> None:
    if options is not FULL:
        pytest.importorskip("peft", reason="peft is not installed (extra `lora`)")
    alone = tune(world, tmp_path / "alone", 1, *options)
    for number, kind in enumerate(kinds):
        strategy = [f"strategy.{option}" for option in f"kind={kind}".split()]
        check_equal(tune(world, tmp_path / str(number), 2, *options, *strategy), alone)
