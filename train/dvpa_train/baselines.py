"""What elastic training is compared with, trained here on the same data for the same FLOPs.

`fixed_<tier>`: one ordinary top-k MoE of the full size, trained at the top tier's k for the nested
run's training FLOPs, then simply run at each tier's k (its pool stays whole; the gate's scale
follows sqrt(k)).
`specialist_<tier>`: one model per tier, cut to that tier's pool and k from the start and trained
alone; all specialists together spend the nested run's FLOPs, each on equally many tokens.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dvpa.config import DvpaConfig
from dvpa.evaluate.metrics import bootstrap_ci
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa_train.config import Recipe, StageConfig
from dvpa_train.examples import make_source
from dvpa_train.logbook import Logbook
from dvpa_train.main import TrainedRun
from dvpa_train.processes import Processes
from dvpa_train.stages import Run


def single_tier(config: DvpaConfig, num_groups: int, top_k: int) -> DvpaConfig:
    """An ordinary MoE: the first `num_groups` groups, one tier."""
    data = config.to_dict()
    for name in ("num_experts_per_tok", "topk_group", "routed_scaling_factor"):
        data.pop(name)
    tier = {
        "name": "only", "num_groups": num_groups, "top_k": top_k, "topk_group": num_groups,
        "routed_scaling_factor": math.sqrt(top_k),
    }  # fmt: skip
    data.update(
        tiers=[tier],
        n_group=num_groups,
        n_routed_experts=num_groups * config.group_size,
        difficulty=None,
    )
    return DvpaConfig.from_dict(data)


def baseline_rows(trained: TrainedRun, console: Console) -> dict[str, dict[str, Any]]:
    """Train the baselines (resumable) and measure them on the test split; rows for `routers`."""
    rows: dict[str, dict[str, Any]] = {}
    config = trained.model.config
    nested_flops = sum(stage.training_flops for stage in trained.stages)
    trains_mtp = any(trained.recipe.mtp_weights())
    per_token = [
        6.0 * (tier.activated_params + trains_mtp * tier.mtp_activated_params)
        for tier in price(config).tiers
    ]
    ordinary = single_tier(config, config.n_group, config.tiers[-1].top_k)
    fixed, flops = _train(trained, "fixed", ordinary, nested_flops / per_token[-1], console)
    for tier in config.tiers:
        at_k = DvpaForCausalLM(single_tier(config, config.n_group, tier.top_k)).eval()
        at_k.load_state_dict(fixed.state_dict())
        rows[f"fixed_{tier.name}"] = _row(trained, at_k, flops)
    share = nested_flops / sum(per_token)
    for tier in config.tiers:
        alone = single_tier(config, tier.num_groups, tier.top_k)
        model, flops = _train(trained, f"specialist-{tier.name}", alone, share, console)
        rows[f"specialist_{tier.name}"] = _row(trained, model, flops)
    return rows


def _train(
    trained: TrainedRun, name: str, config: DvpaConfig, tokens: float, console: Console
) -> tuple[DvpaForCausalLM, float]:
    """One stage from scratch, cosine over its whole length: the model and its training FLOPs."""
    recipe = trained.recipe
    rows = [
        stage.steps * stage.batch_size * (2 if stage.distillation else 1) for stage in recipe.stages
    ]
    rows_per_token = sum(rows) / sum(stage.tokens for stage in trained.stages)
    batch = recipe.stages[0].batch_size
    stage = StageConfig(
        name=name,
        kind="foundation",
        num_tiers=1,
        steps=max(1, round(tokens * rows_per_token / batch)),
        batch_size=batch,
        level_weights=_overall_mix(recipe, rows),
        learning_rate_scale=[1.0, recipe.stages[-1].learning_rate_scale[1]],
    )
    out = trained.out / "baselines" / name
    alone = replace(recipe, name=name, stages=[stage])
    out.mkdir(parents=True, exist_ok=True)
    with Logbook(alone, out) as logbook:
        logbook.join(Processes())
        source = make_source(recipe)
        run = _FixedConfigRun(alone, out, source, trained.tokenizer, console, config, logbook)
        source.prepare(trained.tokenizer)
        reports = run.train()
    return run.load().eval(), reports[0].training_flops


def _overall_mix(recipe: Recipe, rows: list[int]) -> list[float]:
    """The nested run's mix of levels over all its stages, since a baseline has only one."""
    graded = recipe.data.graded
    if graded is None:
        return []
    mixes = np.array([stage.level_weights or graded.train_weights for stage in recipe.stages])
    mixes = mixes / mixes.sum(1, keepdims=True)
    return np.average(mixes, axis=0, weights=rows).tolist()


class _FixedConfigRun(Run):
    """A run whose only stage trains a given config."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        source: Any,
        tokenizer: Any,
        console: Console,
        config: DvpaConfig,
        logbook: Logbook,
    ) -> None:
        super().__init__(recipe, out, source, tokenizer, console, Processes(), {}, logbook)
        self.config = config

    def _whole_start(self, index: int, previous: DvpaForCausalLM | None) -> DvpaForCausalLM:
        torch.manual_seed(self.recipe.seed)
        return DvpaForCausalLM(self.config)


def _row(trained: TrainedRun, model: DvpaForCausalLM, training_flops: float) -> dict[str, Any]:
    tasks, nested = trained.tasks["test"], trained.outcomes["test"]
    table = make_source(trained.recipe).collect(model, trained.tokenizer, tasks)
    assert table.ids == nested.ids
    quality = table.quality[:, 0]
    cost = float(price(model.config).tiers[0].activated_params)
    low, high = bootstrap_ci(quality)
    return {
        "quality": float(quality.mean()),
        "quality_by_level": [
            float(quality[nested.level == level].mean()) for level in np.unique(nested.level)
        ],
        "mean_activated_params": cost,
        "relative_cost": cost / price(trained.model.config).tiers[-1].activated_params,
        "ci95": [low, high],
        "training_flops": training_flops,
    }
