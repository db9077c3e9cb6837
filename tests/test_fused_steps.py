"""The engine's steps of decode rows, fused and operator by operator.

Letters: T rows, L layers.
"""

from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_model
from test_cpu_kernel import DTYPE, needs_kernel
from torch import Tensor

from dvpa.engine.cache import LatentCache
from dvpa.engine.forward import Decoder, Passed, Step
from dvpa.model import DvpaForCausalLM
from dvpa_kernels import DECODE_ROWS, make_routing
from dvpa_kernels.cpu import moe_mlp_cpu, op

PAGE_SIZE = 4


def make_step(rows: int, tiers: Tensor, seed: int = 0) -> Step:
    """Decode rows of as many sequences, each at its own position."""
    g = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 3 * PAGE_SIZE, (rows,), generator=g)
    table = torch.arange(rows * 3).view(rows, 3)
    each = torch.arange(rows)
    return Step(
        token_ids=torch.randint(3, 64, (rows,), generator=g),
        positions=positions,
        tiers=tiers,
        max_tier=int(tiers.max()),
        slots=table[each, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
        bounds=(0, rows, rows, rows),
        decode=slice(0, rows),
        decode_sequence=each.int(),
        decode_length=(positions + 1).int(),
        page_table=table.int(),
        chunks=(),
    )


def pass_through(decoder: Decoder, step: Step, cache: Tensor) -> Passed:
    decoder.cache.storage.copy_(cache)
    with torch.inference_mode():
        return decoder(step, decoder.embed(step.token_ids))


def make_decoder(model: DvpaForCausalLM, rows: int, **given: Any) -> Decoder:
    config = model.config
    cache = LatentCache(config, 3 * rows, PAGE_SIZE, model.dtype, torch.device("cpu"))
    return Decoder(model, cache, **given)


@needs_kernel
@DTYPE
@pytest.mark.parametrize("rows", [1, 7, DECODE_ROWS])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 24, "attention_bias": True, "rope_interleave": False},
        {"n_shared_experts": 0, "norm_topk_prob": False},
    ],
)
def test_a_step_of_decode_rows_is_fused_and_the_same(
    changes: dict[str, Any], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The single operator would leave many rows to F.grouped_mm, which adds in another order.
    for isa in op.MAX_ROWS_PER_EXPERT:
        monkeypatch.setitem(op.MAX_ROWS_PER_EXPERT, isa, (4096, 4096))
    model = tiny_model(tiny_config(**changes)).to(dtype)
    fused, by_operator = (make_decoder(model, rows) for _ in range(2))
    by_operator._fused = None
    tiers = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(rows))
    step = make_step(rows, tiers)
    cache = torch.randn(fused.cache.storage.shape).to(dtype)
    one, other = pass_through(fused, step, cache), pass_through(by_operator, step, cache)
    assert (fused.fused_steps, fused.operator_steps) == (1, 0)
    assert (by_operator.fused_steps, by_operator.operator_steps) == (0, 1)
    assert torch.equal(one.hidden, other.hidden)
    assert torch.equal(one.probe_states, other.probe_states)
    assert one.trunk.shape == other.trunk.shape == (0, model.config.hidden_size)
    assert torch.equal(fused.cache.storage, by_operator.cache.storage)


@needs_kernel
def test_experts_elsewhere_are_called_after_every_layer() -> None:
    model = tiny_model()
    whole = make_decoder(model, 5)
    layers = [layer.mlp for layer in model.model.layers]
    seen = []

    def experts(layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        seen.append(layer)
        of_layer = layers[layer].experts
        routing = make_routing(index, weight, of_layer.num_experts)
        return moe_mlp_cpu(hidden, of_layer.gate_up_proj, of_layer.down_proj, routing)

    parted = make_decoder(model, 5, experts=experts)
    step = make_step(5, torch.tensor([0, 2, 1, 2, 0]))
    cache = torch.randn(whole.cache.storage.shape)
    hidden = pass_through(parted, step, cache).hidden
    assert seen == [1, 2]
    assert parted.fused_steps == 1
    assert torch.equal(hidden, pass_through(whole, step, cache).hidden)


@needs_kernel
def test_more_rows_than_it_takes_run_by_operators() -> None:
    model = tiny_model()
    decoder = make_decoder(model, DECODE_ROWS + 1)
    step = make_step(DECODE_ROWS + 1, torch.zeros(DECODE_ROWS + 1, dtype=torch.int64))
    pass_through(decoder, step, torch.zeros_like(decoder.cache.storage))
    assert (decoder.fused_steps, decoder.operator_steps) == (0, 1)
