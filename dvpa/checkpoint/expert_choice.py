"""What a calibration text decides about a conversion: the experts' order, and the kind of pools.

Hours of work on a large checkpoint, so it is kept as soon as it is known: a conversion that was
stopped goes on with the very same choice, not with one that rounding may have made another.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvpa.checkpoint.calibration_text import CalibrationText
from dvpa.checkpoint.folders import PARTIAL, write_json
from dvpa.checkpoint.importance import (
    Importance,
    Progress,
    measure_importance,
    super_experts,
    tier_losses,
)
from dvpa.checkpoint.pools import as_mapping, order_experts
from dvpa.checkpoint.source import Source
from dvpa.config import DvpaConfig

CHOICE_FILE = "choice.json"  # in a folder that is not complete yet


@dataclass(frozen=True)
class ExpertChoice:
    """How experts are stored, and why.

    Attributes:
        pool: the kind of the tiers' pools.
        orders: by layer, the source's expert at each place.
        losses: nats per token of every tier by kind of pool, where they were measured.
        importance: by layer, REAP of the source's experts, where it was.
        super_experts: (layer, source's expert) pairs put into every pool.
        never_chosen: experts without a single token, over all layers.
    """

    pool: str
    orders: dict[str, list[int]]
    losses: dict[str, list[float]]
    importance: dict[str, list[float]]
    super_experts: list[tuple[int, int]]
    never_chosen: int

    def order(self, layer: int) -> Tensor:
        """The source's expert at each place of a layer, int64 [E]."""
        return torch.tensor(self.orders[str(layer)])

    def outside(self, pool: int) -> list[tuple[int, int]]:
        """Those super experts that are not among the first `pool` of their layer."""
        return [each for each in self.super_experts if each[1] not in self._first(each[0], pool)]

    def _first(self, layer: int, pool: int) -> list[int]:
        return self.orders[str(layer)][:pool]

    def save(self, folder: Path) -> None:
        """Keep it in a folder that is being made."""
        path = folder / CHOICE_FILE
        write_json(path.with_name(f"{path.name}{PARTIAL}"), asdict(self))
        path.with_name(f"{path.name}{PARTIAL}").replace(path)

    @staticmethod
    def load(folder: Path) -> "ExpertChoice | None":
        """What an earlier run kept there, if it got so far."""
        path = folder / CHOICE_FILE
        if not path.is_file():
            return None
        data = json.loads(path.read_text())
        pairs = [(layer, expert) for layer, expert in data.pop("super_experts")]
        return ExpertChoice(**data, super_experts=pairs)


def choose_experts(
    source: Source,
    configs: Mapping[str, DvpaConfig],
    text: CalibrationText | None,
    progress: Progress,
) -> ExpertChoice:
    """Measure experts and tiers on the text; without one, experts keep their order.

    Args:
        configs: the new checkpoint's config by kind of pool.
    """
    measured = None if text is None else measure_importance(source, text.measuring, progress)
    pinned = super_experts(measured.peaks) if measured else []
    plans = {
        kind: (config, _orders(source.config, measured, pinned, kind))
        for kind, config in configs.items()
    }
    losses: dict[str, list[float]] = {}
    if text is not None:
        losses = tier_losses(source, plans, text.held_out, progress)
    chosen = min(plans, key=lambda kind: sum(losses.get(kind, ())))
    return ExpertChoice(
        pool=chosen,
        orders=as_mapping(plans[chosen][1]),
        losses=losses,
        importance={
            str(layer): scores.tolist()
            for layer, scores in (measured.scores.items() if measured else ())
        },
        super_experts=pinned,
        never_chosen=sum(int((c == 0).sum()) for c in measured.counts.values()) if measured else 0,
    )


def _orders(
    config: DvpaConfig,
    measured: Importance | None,
    pinned: Sequence[tuple[int, int]],
    pool: str,
) -> dict[int, Tensor]:
    """By layer, the source's experts in their new order."""
    layers = range(
        config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers
    )
    orders = {}
    for layer in layers:
        experts = config.n_routed_experts
        scores = torch.zeros(experts) if measured is None else measured.scores[layer]
        is_pinned = torch.zeros(experts, dtype=torch.bool)
        is_pinned[[expert for of_layer, expert in pinned if of_layer == layer]] = True
        orders[layer] = order_experts(config, scores, is_pinned, pool)
    return orders
