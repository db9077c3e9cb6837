"""Adapters on a tiny model: what they change, what they must not, and merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import left_padded, tiny_config, tiny_model
from torch import Tensor

pytest.importorskip("peft", reason="peft is not installed (extra `lora`)")

from dvpa.model import DvpaForCausalLM
from dvpa_train.config import LoraConfig
from dvpa_train.lora import add_adapters, merge, num_trained, restore_adapters, save_adapters
from dvpa_train.parts import PARTS, freeze, part_of
from dvpa_train.starts import Start
from dvpa_train.teacher import AdapterTeacher, FrozenTeacher

IDS = left_padded([12, 12]).input_ids
TARGETS = ["attention", "experts", "shared_experts", "dense"]


def logits(model: DvpaForCausalLM, tier: int) -> Tensor:
    with torch.no_grad():
        return model(IDS, tiers=tier, use_cache=False).logits


def train(model: DvpaForCausalLM, steps: int = 3) -> None:
    """A few steps at every tier; large ones, so that whatever can move does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        tiers = torch.tensor([step % 3, 2])
        model(IDS, tiers=tiers, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


def adapted_model(**changes: Any) -> tuple[DvpaForCausalLM, Any, LoraConfig]:
    lora = LoraConfig(**{"rank": 3, "targets": TARGETS, **changes})
    model = tiny_model()
    return model, add_adapters(model, lora, seed=1), lora


def test_fresh_adapters_change_nothing_and_freeze_the_rest() -> None:
    before = tiny_model()
    model, _, _ = adapted_model()
    for tier in range(3):
        assert torch.equal(logits(model, tier), logits(before, tier))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any(part_of(name) in {"router", "embeddings", "norms"} for name in trained)


def test_adapters_equal_the_products_added_by_hand() -> None:
    """Oracle: W + alpha / rank * B A, expert by expert."""
    model, _, lora = adapted_model(targets=["experts"])
    train(model)
    plain = tiny_model()
    wrapped = dict(model.named_modules())
    for name, parameter in plain.named_parameters():
        if part_of(name) != "experts":
            continue
        where, _, own = name.rpartition(".")
        layers = [m for n, m in wrapped.items() if n.startswith(where) and hasattr(m, "get_param")]
        (layer,) = [m for m in layers if m.parameter_name == own]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        experts = len(parameter)
        for expert in range(experts):
            rows = a[lora.rank * expert : lora.rank * (expert + 1)]  # [R, in]
            columns = b[:, expert::experts]  # [out, R]
            with torch.no_grad():
                parameter[expert] += lora.alpha / lora.rank * columns @ rows
    for tier in range(3):
        assert torch.allclose(logits(model, tier), logits(plain, tier), atol=1e-5)


def test_merged_logits_equal_unmerged_ones() -> None:
    model, adapted, _ = adapted_model()
    start = logits(model, 2)
    train(model)
    before = [logits(model, tier) for tier in range(3)]
    assert not torch.allclose(before[2], start, atol=0.1)
    merged = merge(adapted)
    for tier in range(3):
        assert torch.allclose(logits(merged, tier), before[tier], rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(tiny_model().state_dict())
    assert all(p.requires_grad for p in merged.parameters())


def test_adapting_upper_groups_leaves_lower_tiers_bit_identical() -> None:
    """Groups 2 and 3 belong to the top tier alone; its frozen teacher is asked on the way."""
    before = tiny_model()
    model, adapted, _ = adapted_model(targets=["experts"], groups=[2, 3])
    teacher = AdapterTeacher(adapted, model)
    for _ in range(2):
        teacher.logits(IDS, torch.full_like(IDS, 2))
        train(model)
    assert not torch.allclose(logits(model, 2), logits(before, 2), atol=1e-2)
    for tier in (0, 1):
        assert torch.equal(logits(model, tier), logits(before, tier))
    merged, old = merge(adapted).state_dict(), before.state_dict()
    changed: set[int] = set()
    for name in old:
        if part_of(name) == "experts":
            rows = (merged[name] != old[name]).flatten(1).any(1)
            changed |= set(rows.nonzero().flatten().tolist())
        else:
            assert torch.equal(merged[name], old[name]), name
    assert {expert // 4 for expert in changed} == {2, 3}


def test_saved_adapters_are_pefts_own_format_and_come_back(tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapted, lora = adapted_model(groups=[3])
    train(model)
    save_adapters(adapted, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    by_peft = tiny_model()
    PeftModel.from_pretrained(by_peft, str(tmp_path))
    again = tiny_model()
    restore_adapters(again, lora, tmp_path)
    assert num_trained(again) == num_trained(model) > 0
    for tier in range(3):
        assert torch.equal(logits(by_peft, tier), logits(model, tier))
        assert torch.equal(logits(again, tier), logits(model, tier))
    # Restored adapters go on as the kept ones would have, groups included.
    train(model, 2)
    train(again, 2)
    assert torch.equal(logits(again, 2), logits(model, 2))


def test_a_teacher_is_the_model_before_and_leaves_the_student_alone() -> None:
    before = logits(tiny_model(), 2)
    model, adapted, _ = adapted_model()
    model.train()
    train(model)
    wanted = logits(model, 1)
    tiers = torch.full_like(IDS, 2)
    for teacher in (AdapterTeacher(adapted, model), FrozenTeacher(Start(tiny_model()))):
        taught = teacher.logits(IDS, tiers)
        assert torch.equal(taught, before)
        assert not taught.requires_grad
    assert model.training
    assert torch.equal(logits(model, 1), wanted)
    assert num_trained(model) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_every_parameter_has_a_part_and_freezing_takes_exactly_it() -> None:
    model = tiny_model(tiny_config(q_lora_rank=8))
    named = {name: part_of(name) for name, _ in model.named_parameters()}
    assert {n for n, part in named.items() if part is None} == {
        n for n in named if n.startswith("difficulty_head.")
    }
    assert set(named.values()) - {None} == set(PARTS) - {"tier_bias"}
    assert part_of("model.layers.1.mlp.gate.tier_bias") == "tier_bias"
    assert part_of("model.layers.0.mlp.gate_proj.weight") == "dense"
    assert part_of("model.layers.1.self_attn.q_a_layernorm.weight") == "norms"
    count = freeze(model, ["router", "embeddings"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, part in named.items() if part in {"router", "embeddings"}}
    assert count == 64 * 32 + 2 * 16 * 32  # vocabulary x hidden, layers x experts x hidden


def test_a_target_that_the_model_lacks_is_named() -> None:
    model = tiny_model(tiny_config(n_shared_experts=0))
    with pytest.raises(ValueError, match=r"lora\.targets: the model has no shared_experts"):
        add_adapters(model, LoraConfig(targets=["experts", "shared_experts"]), seed=0)
