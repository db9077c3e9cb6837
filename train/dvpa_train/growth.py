"""Growing the pool: a model with more tiers that contains the smaller one unchanged.

New groups are appended. Their down-projections start at zero, so they add nothing at first; gate
and up start random, so that the zero is left in different directions. Lower tiers keep every weight
they use and stay bit-identical. The router rows of new experts start near zero: their score is
about one half, below a trained favourite, and the mix of a new tier stays close to its
predecessor's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa.model.difficulty import DifficultyHead
from dvpa.model.tensor_names import HEAD_PREFIX, ROUTER_WEIGHT, TIER_BIAS
from dvpa_train.draws import draw
from dvpa_train.origins import Drawn, Held, Source, copy, num_weights
from dvpa_train.slices import Slice, materialise, slice_of, slices_of
from dvpa_train.stacked import DOWN, GATE_UP

ROUTER_STD = 0.02


class Grown:
    """The weights of a model of `config` that extends the one of `small` in `source`.

    Raises:
        ValueError: `config` does not contain the tiers of `small`, or only one of the two has a
            multi-token prediction module, whose experts grow like every layer's.
    """

    def __init__(self, source: Source, small: DvpaConfig, config: DvpaConfig, seed: int) -> None:
        if config.unit_size != small.unit_size or config.tiers[: small.num_tiers] != small.tiers:
            raise ValueError(
                f"config: its tiers {config.tier_names} must begin with the model's "
                f"{small.tier_names}"
            )
        if config.num_nextn_predict_layers != small.num_nextn_predict_layers:
            raise ValueError(
                f"config: num_nextn_predict_layers: {config.num_nextn_predict_layers} must be the "
                f"model's, {small.num_nextn_predict_layers}"
            )
        self.source, self.small, self.config, self.seed = source, small, config, seed

    def fill(self, slices: Mapping[str, Slice]) -> None:
        """Copy what the smaller model has; draw, or zero, what is new."""
        old = self.small.n_routed_experts
        routers = torch.Generator().manual_seed(self.seed)
        new: dict[str, int] = {}  # name -> first row to draw
        for name, part in slices.items():
            if name.startswith(HEAD_PREFIX):
                new[name] = 0
            elif name.endswith(TIER_BIAS):
                part.put(0, self._biases(name))
            elif name.endswith(ROUTER_WEIGHT):
                part.put(0, self._router(name, routers))
            else:
                copy(self.source, name, part, old)
            if name.endswith(GATE_UP):
                new[name] = old
            elif name.endswith(DOWN):
                for _, _, local in part.experts(old):
                    local.zero_()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for name, first, rows in draw(self.config):
                skipped = max(new.get(name, first + len(rows)) - first, 0)
                if skipped < len(rows):
                    slices[name].put(first + skipped, rows[skipped:])

    def describe(self) -> str:
        """See `Origin`."""
        old, new = self.small.n_routed_experts, self.config.n_routed_experts
        drawn = num_weights(self.config) / 1e9
        return f"grows from {old} to {new} experts; draws {drawn:.3g}B random weights"

    def _biases(self, name: str) -> Tensor:
        """Old tiers keep their biases; a new one starts from the largest old one's, then zeros."""
        tiers, experts = self.small.num_tiers, self.small.n_routed_experts
        source = self.source.read(name, (slice(0, tiers), slice(0, experts)))
        biases = torch.zeros(self.config.num_tiers, self.config.n_routed_experts)
        biases[:tiers, :experts] = source
        biases[tiers:, :experts] = source[-1]
        return biases

    def _router(self, name: str, generator: torch.Generator) -> Tensor:
        experts, width = self.small.n_routed_experts, self.config.hidden_size
        rows = torch.empty(self.config.n_routed_experts, width)
        rows[:experts] = self.source.read(name, (slice(0, experts), slice(0, width)))
        rows[experts:].normal_(0.0, ROUTER_STD, generator=generator)
        return rows


@torch.no_grad()
def grow(model: DvpaForCausalLM, config: DvpaConfig, seed: int) -> DvpaForCausalLM:
    """A whole model of `config`, which must extend `model`'s.

    Raises:
        ValueError: see `Grown`.
    """
    origin = Grown(Held(model.state_dict()), model.config, config, seed)
    with torch.device("meta"):
        grown = DvpaForCausalLM(config)
    materialise(grown, "cpu")
    origin.fill(slices_of(grown))
    return grown.train(model.training)


@torch.no_grad()
def attach_head(model: DvpaForCausalLM, config: DvpaConfig, seed: int) -> DvpaForCausalLM:
    """Give a fully grown model the difficulty head of `config`, fresh, in place; the model."""
    with torch.random.fork_rng():
        head = DifficultyHead(config)
        tensors = head.named_parameters(prefix=HEAD_PREFIX.rstrip("."))
        Drawn(config, seed).fill({name: slice_of(name, tensor) for name, tensor in tensors})
    model.difficulty_head, model.config.difficulty = head, config.difficulty
    return model
