"""What a stage begins with, where no process may hold the whole model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from dvpa.checkpoint.export import read_config
from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.tiers.tier_map import TierMap
from dvpa_train.growth import Grown
from dvpa_train.origins import Drawn, Origin, Stored


@dataclass(frozen=True)
class Start:
    """A whole model; or one on the meta device, and what fills its slices once it is laid out."""

    model: DvpaForCausalLM
    origin: Origin | None = None


def sharded_start(config: DvpaConfig, folder: Path | None, seed: int) -> Start:
    """A model of `config`: random, or as stored in `folder`, grown if that one has fewer tiers.

    Without a difficulty head: that learns last, from new outcomes.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is incomplete or corrupt, or `config` does not extend it.
    """
    if folder is None:
        return Start(_empty(config), Drawn(config, seed))
    stored, small = Stored(folder), read_config(folder)
    if small.num_tiers < config.num_tiers:
        return Start(_empty(config), Grown(stored, small, config, seed))
    small.difficulty = None
    model = _empty(small)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if (folder / TIER_MAP_FILE).is_file():
        model.tier_map = TierMap.load(folder / TIER_MAP_FILE)
    return Start(model, stored)


def _empty(config: DvpaConfig) -> DvpaForCausalLM:
    with torch.device("meta"):
        return DvpaForCausalLM(config)
