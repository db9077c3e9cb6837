"""Growing the pool: a model with more tiers that contains the smaller one unchanged.

New groups are appended. Their down-projections start at zero, so they add nothing at first; gate
and up start random, so that the zero is left in different directions. Lower tiers keep every weight
they use and stay bit-identical. The router rows of new experts start near zero: their score is
about one half, below a trained favourite, and the mix of a new tier stays close to its
predecessor's.
"""

import torch

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa.model.difficulty import DifficultyHead

ROUTER_STD = 0.02


def grow(model: DvpaForCausalLM, config: DvpaConfig, seed: int) -> DvpaForCausalLM:
    """A model of `config`, which must extend `model`'s: same widths and first tiers, more groups.

    Raises:
        ValueError: `config` does not contain the model's tiers, or only one of the two has a
            multi-token prediction module, whose experts grow like every layer's.
    """
    small = model.config
    if config.unit_size != small.unit_size or config.tiers[: small.num_tiers] != small.tiers:
        raise ValueError(
            f"config: its tiers {config.tier_names} must begin with the model's {small.tier_names}"
        )
    if config.num_nextn_predict_layers != small.num_nextn_predict_layers:
        raise ValueError(
            f"config: num_nextn_predict_layers: {config.num_nextn_predict_layers} must be the "
            f"model's, {small.num_nextn_predict_layers}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        grown = DvpaForCausalLM(config)
    state = model.state_dict()
    for name, target in grown.state_dict().items():
        if name.startswith("difficulty_head."):
            continue
        source = state[name]
        with torch.no_grad():
            if target.shape == source.shape:
                target.copy_(source)
            elif name.endswith("tier_bias"):
                _grow_bias(target, source)
            else:
                _grow_experts(name, target, source, generator)
    return grown.train(model.training)


def _grow_bias(target: torch.Tensor, source: torch.Tensor) -> None:
    """Old tiers keep their biases; a new one starts from the largest old one's, then zeros."""
    tiers, experts = source.shape
    target.zero_()
    target[:tiers, :experts] = source
    target[tiers:, :experts] = source[-1]


def _grow_experts(
    name: str, target: torch.Tensor, source: torch.Tensor, generator: torch.Generator
) -> None:
    target[: len(source)] = source
    new = target[len(source) :]
    if name.endswith("down_proj"):
        new.zero_()
    elif name.endswith("gate.weight"):
        new.normal_(0.0, ROUTER_STD, generator=generator)
    # gate_up_proj keeps the fresh initialisation


def attach_head(model: DvpaForCausalLM, config: DvpaConfig, seed: int) -> DvpaForCausalLM:
    """Give a fully grown model the (freshly initialised) difficulty head of `config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = DvpaForCausalLM(config)
    fresh.load_state_dict(model.state_dict(), strict=False)
    fresh.generation_config = model.generation_config
    assert isinstance(fresh.difficulty_head, DifficultyHead)
    return fresh
