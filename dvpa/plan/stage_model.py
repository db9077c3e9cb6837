"""What the formulas are made of: a stage's model in numbers, and numbers with their explanation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dvpa.plan.workload import TrainStage
from dvpa.pricing import ModelParts, price, split

if TYPE_CHECKING:
    from dvpa.architecture import Architecture


@dataclass(frozen=True)
class Line:
    """One number of a plan (bytes or seconds) and where it comes from."""

    name: str
    value: float
    formula: str


@dataclass(frozen=True)
class StageModel:
    """The model as it exists in one stage.

    Attributes:
        config: the full architecture.
        parts: parameters of the stage's largest tier.
        mean_top_k: experts per token, over the mix of tiers.
        max_top_k: slots of the routing table: the largest tier's.
        mtp_layers: multi-token prediction modules, each a MoE layer with a pass through the head.
        flops_per_token: forward and backward, attention over half a sequence; nothing recomputed.
        layer_flops_per_token: the layers' part of one forward pass: what checkpointing repeats.
        expert_flops_per_token: the routed experts' part of a forward pass.
    """

    config: "Architecture"
    parts: ModelParts
    mean_top_k: float
    max_top_k: int
    mtp_layers: int
    flops_per_token: float
    layer_flops_per_token: float
    expert_flops_per_token: float

    @property
    def num_moe_layers(self) -> int:
        """Layers with an all-to-all, the multi-token prediction module's included."""
        return self.parts.num_moe_layers + self.mtp_layers

    @property
    def routed_params(self) -> int:
        """Parameters of all routed experts."""
        return self.parts.routed + self.mtp_layers * self.parts.num_experts * self.parts.expert

    @property
    def dense_params(self) -> int:
        """All others."""
        parts, hidden = self.parts, self.config.hidden_size
        own = parts.attention + parts.shared_experts + parts.router + 2 * hidden**2 + 3 * hidden
        return parts.total - parts.routed + self.mtp_layers * own

    @property
    def moe_layer_params(self) -> int:
        """Parameters of one MoE layer without its routed experts."""
        return self.parts.attention + self.parts.shared_experts + self.parts.router


def stage_model(config: "Architecture", stage: TrainStage) -> StageModel:
    """The numbers of `config` in `stage`.

    Raises:
        ValueError: more tiers than the model has, or sequences longer than it allows.
    """
    if stage.num_tiers > config.num_tiers:
        raise ValueError(
            f"{stage.name}: num_tiers: {stage.num_tiers} must be in 1 .. {config.num_tiers}"
        )
    if stage.sequence > config.max_position_embeddings:
        raise ValueError(
            f"{stage.name}: sequence: {stage.sequence} must be in 1 .. max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    shares, parts = stage.tier_shares(), split(config, stage.num_tiers - 1)
    top_k = [tier.top_k for tier in config.tiers[: stage.num_tiers]]
    mean_top_k = sum(share * k for share, k in zip(shares, top_k, strict=True))
    # A causal token sees half of its sequence, on average.
    priced = price(config, stage.sequence // 2).tiers[: stage.num_tiers]
    forward = sum(share * t.flops_per_token for share, t in zip(shares, priced, strict=True))
    head, moe, hidden = 2 * parts.head, parts.num_moe_layers, config.hidden_size
    experts = 2 * parts.expert * mean_top_k  # of one layer
    mtp = getattr(config, "num_nextn_predict_layers", 0)
    if mtp:
        layers = parts.num_dense_layers + moe
        context = price(config, stage.sequence // 2).tiers[0].flops_per_token
        context -= price(config).tiers[0].flops_per_token
        own = parts.attention + parts.shared_experts + parts.router + 2 * hidden**2
        forward += mtp * (2 * own + experts + head + context / layers)
    return StageModel(
        config,
        parts,
        mean_top_k,
        max(top_k),
        mtp,
        3 * forward,
        forward - (1 + mtp) * head,
        (moe + mtp) * experts,
    )


def amount(number: float) -> str:
    """Three digits and a decimal unit, as in 31.8G."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if abs(number) < 999.5 or unit == "P":
            return f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("unreachable")
