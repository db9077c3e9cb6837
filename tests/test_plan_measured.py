"""Training on paper against the trainer: the tiers it draws, the bytes that autograd keeps."""

from typing import Any

import numpy as np
import pytest
import torch

from dvpa.config import load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.plan import Assumptions, Layout, TrainStage
from dvpa.plan.memory import predict_memory
from dvpa.plan.stage_model import stage_model
from dvpa_train.batches import assign_tiers
from dvpa_train.config import StageConfig


def test_tier_shares_are_those_the_trainer_draws() -> None:
    rows, length = 4000, 32
    ids = torch.ones(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids}
    for paired, weights in ((0.5, [0.5, 0.2, 0.3, 0.0]), (0.0, [0.1, 0.2, 0.3, 0.4])):
        kind: Any = "joint" if paired else "expansion"
        config = StageConfig(
            "s", kind, 4, 1, rows, weights, distillation=paired, switch_fraction=0.5
        )
        drawn = assign_tiers(batch, config, seed=0, step=0)
        found = np.bincount(drawn.tiers.flatten().numpy(), minlength=4) / drawn.tiers.numel()
        stage = TrainStage("s", 4, 1, rows, length, tuple(weights), paired > 0, 0.5)
        assert stage.tokens == drawn.num_tokens
        assert sum(stage.tier_shares()) == pytest.approx(1)
        assert found == pytest.approx(np.array(stage.tier_shares()), abs=0.015)


def saved_bytes(model: DvpaForCausalLM, ids: torch.Tensor, tiers: torch.Tensor) -> int:
    """What autograd keeps of a pass through the layers, parameters left out; every storage once."""
    kept: dict[int, torch.Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = model.model(ids, tiers=tiers, use_cache=False)
    assert held is not None
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize("name", ["nano", "words"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(name: str, dtype: torch.dtype) -> None:
    config = load_model_config(f"model/{name}.yaml")
    torch.manual_seed(0)
    model = DvpaForCausalLM(config).to(dtype).train()
    batch, length = 4, 64
    measured = saved_bytes(model, torch.randint(5, 300, (batch, length)), torch.arange(4))
    stage = TrainStage("all", 4, 1, batch, length, (0.25,) * 4)
    assume = Assumptions(imbalance=1.0, compute_bytes=dtype.itemsize)
    numbers = stage_model(config, stage)
    lines = predict_memory(numbers, stage, Layout(1, 1, False), batch, assume)
    predicted = {line.name: line.value for line in lines}["activations kept"]
    assert 0.95 < predicted / measured < 1.02
