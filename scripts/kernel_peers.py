"""Contenders of the kernel benchmark: builders of one call over the same inputs, results compared.

A builder returns a function without arguments that gives y [T, D]; what it cannot do it says in an
exception, which becomes the reason in its row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Inputs, Shape
from torch import Tensor

from dvpa_kernels import make_routing, moe_mlp

Call = Callable[[], Tensor]
Builder = Callable[[Inputs], Call]
BASELINE = "grouped_mm"
GRAPH = "+graph"
# Largest relative Frobenius error against the reference, both in the same dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class CannotExpressError(Exception):
    """A layer that this implementation has no way to compute."""


def _ours(inputs: Inputs, backend: str) -> Call:
    """Routing table to y with one of our backends: sorting the rows is part of the call."""
    experts = inputs.w_down.shape[0]

    def call() -> Tensor:
        routing = make_routing(inputs.index, inputs.weight, experts)
        return moe_mlp(inputs.x, inputs.w_gate_up, inputs.w_down, routing, backend=backend)

    return call


def _transformers(inputs: Inputs, implementation: str) -> Call:
    """Transformers' own experts module (Qwen3-MoE's) around our weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, width = inputs.w_down.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width, num_experts=experts, hidden_act="silu"
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = inputs.w_gate_up, inputs.w_down
    config._experts_implementation = implementation
    # Empty slots are its sentinels of expert parallelism; newer versions look for them only then.
    module._is_expert_parallel = not inputs.is_uniform
    return lambda: module(inputs.x, inputs.index, inputs.weight)


def _expert_loop(inputs: Inputs) -> Call:
    """One pair of GEMMs per expert that has rows, in plain PyTorch."""
    experts = inputs.w_down.shape[0]

    def call() -> Tensor:
        routing = make_routing(inputs.index, inputs.weight, experts)
        bounds = routing.expert_offsets.tolist()
        y = torch.zeros_like(inputs.x)
        for expert in range(experts):
            start, end = bounds[expert], bounds[expert + 1]
            if start == end:
                continue
            token = routing.token_index[start:end]
            gate, up = F.linear(inputs.x[token], inputs.w_gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, inputs.w_down[expert])
            y.index_add_(0, token, (out * routing.weight[start:end, None]).to(y.dtype))
        return y

    return call


def _liger(inputs: Inputs) -> Call:
    """Liger's fused MoE (Triton)."""
    if inputs.x.device.type != "cuda":
        raise CannotExpressError("needs a CUDA GPU")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    if not inputs.is_uniform:
        raise CannotExpressError("cannot express: tokens with different k")
    index = inputs.index.int()
    return lambda: LigerFusedMoEFunction.apply(
        inputs.x, inputs.w_gate_up, inputs.w_down, index, inputs.weight
    )


def captured(build: Builder) -> Builder:
    """The same call replayed from a CUDA graph, without its launch costs."""

    def build_graph(inputs: Inputs) -> Call:
        call = build(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return build_graph


def builders(device: str, with_graphs: bool) -> dict[str, Builder]:
    """All contenders on a device; the baseline is `F.grouped_mm` over rows sorted by expert."""
    ours = "triton" if device == "cuda" else "cpu"
    plain: dict[str, Builder] = {
        f"dvpa_{ours}": partial(_ours, backend=ours),
        BASELINE: partial(_ours, backend="torch"),
        "transformers_grouped_mm": partial(_transformers, implementation="grouped_mm"),
        "transformers_eager": partial(_transformers, implementation="eager"),
        "expert_loop": _expert_loop,
        "liger": _liger,
    }
    if not with_graphs:
        return plain
    names = (f"dvpa_{ours}", BASELINE, "transformers_grouped_mm")
    return plain | {name + GRAPH: captured(plain[name]) for name in names}


@torch.no_grad()
def reference_of(inputs: Inputs) -> Tensor:
    """What every contender must compute."""
    return _ours(inputs, backend="reference")()


@torch.no_grad()
def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in fp32; NaN anywhere gives NaN."""
    difference = torch.linalg.vector_norm(out.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))


def qwen3_moe(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """A random two-layer Qwen3-MoE of this shape and one prompt of `tokens` ids."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import dvpa  # noqa: F401  registers "dvpa"

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=shape.hidden, moe_intermediate_size=shape.width,
        intermediate_size=shape.width, num_experts=shape.experts, num_hidden_layers=2,
        num_experts_per_tok=shape.mixes[0].tiers[0][0], num_attention_heads=shape.hidden // 128,
        num_key_value_heads=shape.hidden // 128, head_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    # to_empty leaves the rotary frequencies, a buffer, unset.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model, torch.randint(0, 256, (1, tokens), device=device)
