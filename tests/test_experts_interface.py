"""`set_experts_implementation("dvpa")` on Transformers' own MoE models, against their "eager"."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dvpa.experts_interface import NAME, experts_forward

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@torch.no_grad()
def build(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model in fp32."""
    torch.manual_seed(0)
    if family == "qwen3_moe":
        fields = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
        config = Qwen3MoeConfig(**{**SIZES, **fields, "head_dim": 16, **changes})
        return Qwen3MoeForCausalLM(config).eval()
    if family == "olmoe":
        fields = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False}
        return OlmoeForCausalLM(OlmoeConfig(**{**SIZES, **fields, **changes})).eval()
    config = DeepseekV3Config(
        **SIZES, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
        topk_group=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)
    return model


def outcome(model: PreTrainedModel, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every gradient of a random projection of them."""
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    model.zero_grad()
    ids = torch.randint(1, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(ids, use_cache=False).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    named = model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_logits_and_gradients_equal_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    expected, expected_gradients = outcome(model, "eager")
    calls = []
    # Without this, a silent fall back to eager would pass.
    monkeypatch.setattr(
        "dvpa.experts_interface.expert_mlp",
        lambda *inputs: calls.append(inputs[0].shape) or original(*inputs),
    )
    logits, gradients = outcome(model, NAME)
    assert len(calls) == sum(name.endswith("gate_up_proj") for name in gradients) > 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    assert any("experts" in name and gradients[name].any() for name in gradients)
    for name, gradient in gradients.items():
        bound = 1e-5 * expected_gradients[name].norm() + 1e-6
        assert (gradient - expected_gradients[name]).norm() <= bound, name


def original(*inputs: Any) -> Tensor:
    from dvpa.ops import expert_mlp

    return expert_mlp(*inputs)


def experts_of(model: PreTrainedModel) -> Any:
    """The experts module of the last layer."""
    return model.model.layers[-1].mlp.experts


@torch.no_grad()
def test_sentinels_are_empty_slots() -> None:
    """Expert-parallel ranks see indices of E and beyond; both mean: not here."""
    experts = experts_of(build("qwen3_moe"))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 32, generator=g)
    index = torch.tensor([[0, 8, 1], [8, 8, 8], [7, 2, 3], [90, 4, 8], [5, 6, 9]])
    weight = torch.rand(5, 3, generator=g) + 0.1  # not zero: the index alone must empty a slot
    expected = torch.zeros_like(x)
    for token, slot in (index < 8).nonzero().tolist():
        expert = index[token, slot]
        gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
        hidden = experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
        expected[token] += weight[token, slot] * hidden
    out = experts_forward(experts, x, index, weight)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not out[1].any()


@torch.no_grad()
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_follow_transformers(weight_dtype: torch.dtype) -> None:
    """fp32 hidden states over bf16 weights (autocast): computed in bf16, returned in fp32."""
    experts = experts_of(build("qwen3_moe"))
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    x, weight = torch.randn(2, 32), torch.rand(2, 3).to(weight_dtype)
    expected = experts_forward(experts, x, index, weight.float())
    out = experts_forward(experts.bfloat16(), x, index, weight)
    assert out.dtype == torch.float32
    assert (out - expected).norm() <= 2e-2 * expected.norm()


def test_an_activation_that_is_not_silu_is_refused() -> None:
    model = build("qwen3_moe", hidden_act="gelu")
    model.set_experts_implementation(NAME)
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts has act_fn=GELU\w*, not SiLU"):
        model(torch.tensor([[3, 4]]))


def test_another_layout_is_refused() -> None:
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8
        )
    )
    model.set_experts_implementation(NAME)
    with pytest.raises(ValueError, match=r"GptOssExperts has is_concatenated=False"):
        model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("is_transposed", True),
        ("has_bias", True),
        ("has_gate", False),
        ("is_concatenated", False),
        ("has_post_expert_norm", True),
    ],
)
def test_every_setting_is_named(setting: str, value: bool) -> None:
    experts = experts_of(build("qwen3_moe"))
    setattr(experts, setting, value)
    with pytest.raises(ValueError, match=f"Qwen3MoeExperts has {setting}={value}"):
        experts_forward(experts, torch.zeros(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))


def test_a_gate_of_the_models_own_is_refused() -> None:
    experts = experts_of(build("qwen3_moe"))

    class Clamped(type(experts)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.clamp(max=1.0).chunk(2, dim=-1)
            return self.act_fn(gate) * up

    experts.__class__ = Clamped
    with pytest.raises(ValueError, match="Clamped has its own _apply_gate"):
        experts_forward(experts, torch.zeros(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))


@torch.no_grad()
def test_compiles_into_one_graph() -> None:
    # bf16: F.grouped_mm of torch 2.13 refuses fp32 while it is being compiled.
    experts = experts_of(build("qwen3_moe")).bfloat16()
    experts.config._experts_implementation = NAME
    index = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    x, weight = torch.randn(3, 32).bfloat16(), torch.rand(3, 3)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, index, weight), experts(x, index, weight))


# torch is imported once; the orders are forked from there.
ORDERS = """
import os, sys, traceback
import torch

assert "transformers" not in sys.modules
failed = []
for order in ("dvpa, transformers", "transformers, dvpa"):
    child = os.fork()
    if child == 0:
        try:
            exec(f"import {order}")
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
            from dvpa.experts_interface import experts_forward
            assert ALL_EXPERTS_FUNCTIONS["dvpa"] is experts_forward
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(order)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def test_registered_in_either_order_of_imports() -> None:
    done = subprocess.run([sys.executable, "-c", ORDERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registered_here_too() -> None:
    assert ALL_EXPERTS_FUNCTIONS[NAME] is experts_forward
