"""Our expert kernels for any Transformers MoE: `model.set_experts_implementation("dvpa")`.

Registered by `import dvpa` (dvpa/registration.py). Transformers stacks the experts of Qwen3-MoE,
OLMoE, DeepSeek-V3 and most others as [E, 2F, D] and [E, D, F] SwiGLU, which is our layout.

Letters: T tokens, K slots, E experts, D hidden, F expert width.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dvpa.ops import expert_mlp

NAME = "dvpa"
# What `use_experts_implementation` writes on an experts module; absent in older Transformers means
# the default, and the defaults are ours.
_LAYOUT = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}
# Names of torch's class, Transformers' class and torch's function.
_SILU = ("SiLU", "SiLUActivation", "silu")


def register_experts(moe: ModuleType) -> None:
    """Add "dvpa" to the table in `transformers.integrations.moe`."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of a Transformers experts module `self`: [T, D], [T, K], [T, K] -> [T, D].

    Slots with an index of E or more are empty (expert-parallel sentinels). As Transformers' own
    implementations do, computes in the dtype of the weights and returns that of `hidden_states`.

    Raises:
        ValueError: the experts are no [E, 2F, D] / [E, D, F] SwiGLU; names the model's setting.
    """
    check_layout(self)
    weights: Any = self  # nn.Module declares its parameters as Tensor | Module
    gate_up, down = weights.gate_up_proj, weights.down_proj
    if top_k_weights.dtype not in (torch.float32, gate_up.dtype):
        top_k_weights = top_k_weights.float()
    out = expert_mlp(
        hidden_states.to(gate_up.dtype),
        gate_up,
        down,
        top_k_index.clamp(max=gate_up.shape[0]),
        top_k_weights,
    )
    return out.to(hidden_states.dtype)


def check_layout(experts: nn.Module) -> None:
    """Refuse what our kernels do not compute.

    Raises:
        ValueError: naming the class and the setting.
    """
    name = type(experts).__name__
    for setting, ours in _LAYOUT.items():
        theirs = getattr(experts, setting, ours)
        if theirs != ours:
            raise ValueError(f"experts implementation 'dvpa': {name} has {setting}={theirs}")
    activation: Any = getattr(experts, "act_fn", None)
    shown = getattr(activation, "__name__", type(activation).__name__)
    if shown not in _SILU:
        raise ValueError(f"experts implementation 'dvpa': {name} has act_fn={shown}, not SiLU")
    # A gate of the model's own (clamped, scaled) is not SwiGLU even where act_fn is SiLU.
    gate: Any = getattr(type(experts), "_apply_gate", None)
    if gate is not None and gate.__module__ != "transformers.integrations.moe":
        raise ValueError(f"experts implementation 'dvpa': {name} has its own _apply_gate")
