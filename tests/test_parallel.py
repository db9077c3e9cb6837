"""Every strategy on 2 and 4 processes takes the steps of a single process: losses and gradients.

fp32, gloo, pico, 20 steps of each stage; expert parallelism, ZeRO and what goes with them included;
some of them with the loss in chunks, which a single process takes at once.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_worker import WATCHED_STEPS
from train_world import STAGES, Trained, train, two_experts

LONG = tuple(f"stages.{name}.steps=20" for name in STAGES)
SAME = 1e-5
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
REHEARSAL = (NEEDS_DEEPSPEED, pytest.mark.rehearsal)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return two_experts(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A single process."""
    return train(tmp_path_factory.mktemp("alone") / "run", 1, *LONG, model)


def check_equal(found: Trained, expected: Trained, has_gradients: bool = True) -> None:
    """Losses of every step, gradients of some, and each stage's model."""
    assert [step[:2] for step in found.steps] == [step[:2] for step in expected.steps]
    assert len(found.steps) == 20 * len(STAGES)
    assert found.losses == pytest.approx(expected.losses, rel=SAME)
    for number, stage in enumerate(STAGES):
        for step in WATCHED_STEPS if has_gradients else ():
            check_gradients(found.gradients(stage, step), expected.gradients(stage, step))
        ours = load_file(found.model(number) / "model.safetensors")
        theirs = load_file(expected.model(number) / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-3, msg=name)


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each differs by at most `SAME` of the whole gradient's norm.

    (Of its own norm would ask for the impossible: with one expert a token, a normalised gate has no
    gradient but rounding.)
    """
    assert found.keys() == expected.keys()
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        difference = (found[name].reshape(grad.shape) - grad).norm()
        assert difference <= SAME * norm, name


def test_expert_parallelism_on_two_processes(model: str, alone: Trained, tmp_path: Path) -> None:
    """The worker also checks that each rank starts from its own experts, not the first one's."""
    kind = ("strategy.kind=fsdp2", "strategy.expert_parallel=2", "strategy.loss_chunk=50")
    check_equal(train(tmp_path / "run", 2, *LONG, model, *kind), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, "kind=ddp"),
        (4, "kind=ddp accumulate=2 loss_chunk=20"),
        (2, "kind=fsdp2"),
        (4, "kind=fsdp2 activation_checkpointing=true"),
        (4, "kind=fsdp2 expert_parallel=2 accumulate=2"),
        pytest.param(2, "kind=deepspeed zero_stage=1", marks=REHEARSAL),
        pytest.param(2, "kind=deepspeed zero_stage=2", marks=NEEDS_DEEPSPEED),
        pytest.param(4, "kind=deepspeed zero_stage=2", marks=REHEARSAL),
        pytest.param(2, "kind=deepspeed zero_stage=3", marks=NEEDS_DEEPSPEED),
        pytest.param(2, "kind=deepspeed zero_stage=1 accumulate=2", marks=REHEARSAL),
        pytest.param(2, "kind=deepspeed zero_stage=2 accumulate=4", marks=REHEARSAL),
        pytest.param(2, "kind=deepspeed zero_stage=3 accumulate=2", marks=NEEDS_DEEPSPEED),
        pytest.param(2, "kind=deepspeed zero_stage=3 loss_chunk=50", marks=REHEARSAL),
    ],
)
def test_every_strategy_takes_the_same_steps(
    ranks: int, options: str, model: str, alone: Trained, tmp_path: Path
) -> None:
    kind = [f"strategy.{option}" for option in options.split()]
    found = train(tmp_path / "run", ranks, *LONG, model, *kind)
    check_equal(found, alone, has_gradients="deepspeed" not in options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "kind=fsdp2 expert_parallel=2 precision=bf16",
        pytest.param("kind=deepspeed zero_stage=1 precision=bf16", marks=REHEARSAL),
        pytest.param("kind=deepspeed zero_stage=2 precision=bf16", marks=REHEARSAL),
        pytest.param("kind=deepspeed zero_stage=3 precision=bf16", marks=NEEDS_DEEPSPEED),
        pytest.param(
            "kind=fsdp2 expert_parallel=2 compile=true",
            marks=pytest.mark.skipif(
                "DVPA_COMPILE" not in os.environ,
                reason="minutes of compiling: set DVPA_COMPILE to run it",
            ),
        ),
    ],
)
def test_what_changes_the_arithmetic_stays_near(
    options: str, model: str, alone: Trained, tmp_path: Path
) -> None:
    """bf16 products over fp32 weights; compiled layers."""
    kind = [f"strategy.{option}" for option in options.split()]
    found = train(tmp_path / "run", 2, *LONG, model, *kind)
    assert found.losses == pytest.approx(alone.losses, rel=0.02)
    saved = load_file(found.model(2) / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_a_lock_of_a_killed_build_holds_nobody_up(model: str, tmp_path: Path) -> None:
    """DeepSpeed waits for ever on such a lock when it builds; it must not come to that."""
    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    folder = tmp_path / "extensions" / version / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    few = [f"stages.{name}.steps=2" for name in STAGES]
    kind = ["strategy.kind=deepspeed", "strategy.zero_stage=2"]
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    found = train(tmp_path / "run", 2, *few, model, *kind, **variables)
    assert len(found.steps) == 6
    assert (folder / "lock").exists() and len(list(folder.iterdir())) == 1, "nothing was built"
