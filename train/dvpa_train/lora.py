"""Low-rank adapters through peft (Hu et al., arXiv 2106.09685), put into the model in place.

The routed experts are stacked parameters, not linear layers: peft adapts those by
`target_parameters`, one pair of factors per expert, and adds their product to the whole stack in
every forward pass. That costs time and memory of the size of the experts, whatever the rank; it
leaves the kernels as they are.

Adapters can be kept to some expert groups. The others' factors exist but get no gradient, so their
product stays exactly zero and tiers below the adapted groups stay bit-identical.

Letters: E experts, R rank.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa_train.config import LoraConfig
from dvpa_train.parts import part_of

if TYPE_CHECKING:
    from peft import PeftModel

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


def add_adapters(
    model: DvpaForCausalLM, lora: LoraConfig, seed: int, base: str | None = None
) -> "PeftModel":
    """Put fresh adapters into `model`, in place, and freeze all else; they change nothing at first.

    Args:
        base: where the model came from, for whoever loads the adapter with peft.

    Raises:
        ValueError: peft is not installed, or a target does not exist in this model.
    """
    peft = _peft()
    modules, parameters = _targets(model, lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=modules,
        target_parameters=parameters,
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of Transformers, to peft
        torch.manual_seed(seed)
        adapted: PeftModel = peft.get_peft_model(model, config)
    _keep_to_groups(model, lora.groups)
    return adapted


def restore_adapters(model: DvpaForCausalLM, lora: LoraConfig, folder: Path) -> "PeftModel":
    """Put the adapters that `save_adapters` wrote into `model`, in place, to train on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted: PeftModel = _peft().PeftModel.from_pretrained(
            model, str(folder), is_trainable=True
        )
    _keep_to_groups(model, lora.groups)
    return adapted


def save_adapters(adapted: "PeftModel", folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft reads them."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def merge(adapted: "PeftModel") -> DvpaForCausalLM:
    """The model with the adapters added to its weights, and nothing of peft left in it.

    Raises:
        ValueError: the adapters hold NaN or infinity.
    """
    merged: DvpaForCausalLM = adapted.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)


def num_trained(model: nn.Module) -> int:
    """Parameters (scalars) that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("lora: needs peft, the extra `lora`: pip install dvpa[lora]") from None
    return peft


def _targets(model: nn.Module, parts: list[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of the stacked parameters, of these parts."""
    modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) in parts
    ]
    parameters = [
        name
        for name, _ in model.named_parameters()
        if part_of(name) == "experts" and "experts" in parts and name.endswith(EXPERT_PARAMETERS)
    ]
    found = {part_of(name) for name in (*modules, *parameters)}
    for part in parts:
        if part not in found:
            raise ValueError(f"lora.targets: the model has no {part}")
    return modules, parameters


def _keep_to_groups(model: DvpaForCausalLM, groups: list[int]) -> None:
    """Let only the experts of `groups` (empty: all) be trained."""
    if not groups:
        return
    from peft.tuners.lora.layer import ParamWrapper

    kept_E = _experts_of(model.config, groups)
    for module in model.modules():
        if not isinstance(module, ParamWrapper):
            continue
        for name, rank in module.r.items():
            # peft lays A out as [E * R, in], expert by expert, and B as [out, R * E], rank by rank.
            _mask_gradient(module.lora_A[name].weight, kept_E.repeat_interleave(rank)[:, None])
            _mask_gradient(module.lora_B[name].weight, kept_E.repeat(rank)[None])


def _experts_of(config: DvpaConfig, groups: list[int]) -> Tensor:
    """1.0 for the experts of these groups, else 0.0; [E]."""
    of_group = torch.arange(config.n_routed_experts) // config.unit_size
    return torch.isin(of_group, torch.tensor(groups)).float()


def _mask_gradient(parameter: nn.Parameter, mask: Tensor) -> None:
    parameter.register_hook(lambda gradient: gradient * mask.to(gradient))
