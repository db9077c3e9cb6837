"""The loss in chunks of positions is the loss at once: value, report and every gradient."""

from typing import Any

import pytest
import torch
from helpers import mtp_model, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvpa.model import DvpaForCausalLM
from dvpa_train import module as module_file
from dvpa_train.batches import Rows, assign_tiers, collate_step
from dvpa_train.config import OptimizerConfig, StageConfig, StrategyConfig, load_recipe
from dvpa_train.losses import LOSS_CHUNK, MtpSchedule, Scorer, StepSums, in_chunks
from dvpa_train.module import TierModule
from dvpa_train.starts import Start
from dvpa_train.teacher import FrozenTeacher

EXAMPLES = [
    ([1, 7, 8], [9, 2]), ([1, 5], [6, 4, 3, 2]), ([1, 4], [2]), ([1, 12, 13, 14], [3, 5, 2]),
]  # fmt: skip
SINGLE = StageConfig("single", "expansion", 3, 100, 4, [0.3, 0.3, 0.4])
PAIRED = StageConfig(
    "paired", "joint", 3, 100, 4, [0.5, 0.5, 0.0], distillation=0.4, distillation_temperature=2.0
)
FROZEN = StageConfig(
    "frozen", "joint", 3, 100, 4, [0.5, 0.5, 0.0], distillation=0.4, teacher="frozen",
    distill_top=True,
)  # fmt: skip


def step(
    stage: StageConfig, chunk: int | None, mtp: float = 0.0
) -> tuple[TierModule, Tensor, dict[str, Tensor]]:
    """A step of a fresh model: its module, its loss and its gradients."""
    model = mtp_model() if mtp else tiny_model()
    teacher = FrozenTeacher(Start(tiny_model(seed=7))) if stage.teacher == "frozen" else None
    module = TierModule(
        model.train(),
        stage,
        OptimizerConfig(),
        seed=0,
        strategy=StrategyConfig(loss_chunk=chunk),
        mtp=MtpSchedule(mtp, mtp),
        teacher=teacher,
    )
    loss = module.training_step(collate_step((EXAMPLES, EXAMPLES), 0, prompt_loss=True), 0)
    loss.backward()
    module.end_step()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return module, loss.detach(), grads


@pytest.mark.parametrize("mtp", [0.0, 0.3])
@pytest.mark.parametrize("stage", [SINGLE, PAIRED, FROZEN], ids=lambda stage: stage.name)
@pytest.mark.parametrize("chunk", [1, 4, 5, 1000])
def test_a_step_in_chunks_is_the_step_at_once(stage: StageConfig, chunk: int, mtp: float) -> None:
    whole, expected, grads = step(stage, 0, mtp)
    module, loss, found = step(stage, chunk, mtp)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert module.latest == pytest.approx(whole.latest, rel=1e-5)
    assert module.training_flops == whole.training_flops
    assert found.keys() == grads.keys()
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    for name, grad in grads.items():
        assert (found[name] - grad).norm() <= 1e-6 * norm, name


@given(positions=st.integers(0, 9), chunk=st.integers(1, 11), frozen=st.booleans())
def test_terms_of_any_number_of_positions(positions: int, chunk: int, frozen: bool) -> None:
    """fp64, where only a mistake is larger than rounding; none at all still reaches the head."""
    g = torch.Generator().manual_seed(positions)
    head, other = (torch.randn(11, 6, generator=g, dtype=torch.float64) for _ in range(2))
    head.requires_grad_()
    scorer = Scorer(lambda x: x @ head.T, lambda x: x @ other.T, temperature=1.5)
    columns: list[Any] = [
        torch.randn(positions, 6, generator=g, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]
    columns.append(torch.randint(0, 11, (positions,), generator=g))
    if frozen:
        columns.append(torch.randn(positions, 6, generator=g, dtype=torch.float64))
    results = []
    for size in (0, chunk):
        terms = in_chunks(scorer.pair, columns, size)
        assert len(terms) == 3 + frozen
        assert all(term.shape == (positions,) for term in terms)
        total = sum((i + 1) * term.double().sum() for i, term in enumerate(terms))
        results.append([*terms, *torch.autograd.grad(total, [head, *columns[:2]])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", [SINGLE, PAIRED, FROZEN], ids=lambda stage: stage.name)
def test_no_more_positions_than_a_chunk_have_logits(
    stage: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    head = DvpaForCausalLM.__init__

    def counted(self: DvpaForCausalLM, *args: Any) -> None:
        head(self, *args)
        self.lm_head.register_forward_pre_hook(lambda _, x: sizes.append(x[0][..., 0].numel()))

    monkeypatch.setattr(DvpaForCausalLM, "__init__", counted)
    step(stage, 0)
    assert max(sizes) > 6
    sizes.clear()
    step(stage, 6)
    scored = sum(len(prompt + completion) - 1 for prompt, completion in EXAMPLES)
    heads = {"single": 1, "paired": 2, "frozen": 3}[stage.name]
    assert max(sizes) <= 6
    assert sum(sizes) == 2 * heads * scored  # forward, and again backward


def test_many_logits_are_made_in_chunks_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, _ = step(SINGLE, None)
    batch = collate_step((EXAMPLES, EXAMPLES), 0, prompt_loss=True)
    batch.pop("scored")
    rows = assign_tiers(batch, SINGLE, 0, 0)
    assert isinstance(rows, Rows)
    assert module.loss_chunk(rows) == 0
    monkeypatch.setattr(module_file, "WHOLE_LOGITS", rows.input_ids.numel() * 64)
    assert module.loss_chunk(rows) == 0
    assert module.loss_chunk(rows, with_mtp=True) == LOSS_CHUNK
    module.strategy.loss_chunk = 3
    assert module.loss_chunk(rows) == 3


def test_labels_without_logits_are_refused() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="labels: their loss needs logits"):
        tiny_model()(ids, tiers=0, labels=ids, with_logits=False)
    out = tiny_model()(ids, tiers=0, with_logits=False)
    assert out.logits is None
    assert out.last_hidden_state.shape == (1, 3, 32)


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_chunk: -1 must be 0"):
        load_recipe("train/pico.yaml", ["strategy.loss_chunk=-1"])


def test_the_report_counts_every_position_once() -> None:
    sums = [StepSums(step(PAIRED, chunk)[0]._sums.values) for chunk in (0, 3)]
    torch.testing.assert_close(sums[0].values, sums[1].values, rtol=1e-5, atol=1e-6)
