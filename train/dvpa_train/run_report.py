"""What `dvpa train` reports: held-out nll and quality per tier, and how good the head is."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dvpa.evaluate.report import describe_environment, finite
from dvpa.evaluate.routing import adaptive_tiers, difficulty_metrics, spent
from dvpa.evaluate.table import OutcomeTable
from dvpa.pricing import price
from dvpa_train.config import load_recipe
from dvpa_train.main import WHOLE, TrainedRun, routed_costs, run_recipe


def train_and_report(
    recipe_path: str | Path, out: str | Path | None = None, overrides: list[str] | None = None
) -> Path:
    """Run or resume a recipe into `out` (default: runs/NAME), report, and return the run folder.

    Raises:
        FileNotFoundError: the recipe or data it names does not exist.
        ValueError: a bad recipe or override, or `out` holds another run.
    """
    recipe = load_recipe(recipe_path, overrides)
    console = Console(stderr=True)
    folder = Path(out) if out else Path("runs") / recipe.name
    trained = run_recipe(recipe, folder, console)
    if trained is not None:  # one of several processes reports
        report_run(trained, console)
    return folder


def report_run(trained: TrainedRun, console: Console) -> dict[str, Any]:
    """Write `report.json` into the run folder, show its tables, and return it."""
    test, config = trained.outcomes["test"], trained.model.config
    whole = trained.outcomes[WHOLE]
    costs = [tier.activated_params for tier in price(config).tiers]
    chosen = adaptive_tiers(trained.model.tier_map, test.difficulty)
    rows = np.arange(len(test))
    report = {
        "name": trained.recipe.name,
        "seed": trained.recipe.seed,
        "tiers": [
            {
                "name": name,
                "activated_params": cost,
                "nll": float(whole.nll[:, tier].mean()),
                "quality": float(whole.quality[:, tier].mean()),
            }
            for tier, (name, cost) in enumerate(zip(config.tier_names, costs, strict=True))
        ],
        "by_kind": [_of_kind(whole, kind) for kind in sorted(set(whole.kind))],
        "adaptive": {
            "quality": float(test.quality[rows, chosen].mean()),
            "nll": float(test.nll[rows, chosen].mean()),
            "mean_activated_params": spent(routed_costs(costs, test), chosen),
            "tier_share": (np.bincount(chosen, minlength=len(costs)) / len(test)).tolist(),
        },
        "difficulty": difficulty_metrics(test),
        "stages": [stage.__dict__ for stage in trained.stages],
        "environment": describe_environment(),
    }
    report = finite(report)
    temporary = trained.out / "report.tmp"
    temporary.write_text(json.dumps(report, indent=1))
    os.replace(temporary, trained.out / "report.json")
    _show(report, console, trained.out)
    return report


def _of_kind(test: OutcomeTable, kind: str) -> dict[str, Any]:
    inside = np.array(test.kind) == kind
    return {
        "kind": kind,
        "num_requests": int(inside.sum()),
        "nll_by_tier": test.nll[inside].mean(0).tolist(),
        "quality_by_tier": test.quality[inside].mean(0).tolist(),
    }


def _show(report: dict[str, Any], console: Console, out: Path) -> None:
    table = Table(title=f"{report['name']}: held-out nll per token (nats), by tier")
    table.add_column("examples")
    for tier in report["tiers"]:
        table.add_column(tier["name"], justify="right")
    for row in report["by_kind"]:
        table.add_row(
            f"{row['kind']} ({row['num_requests']})", *(f"{nll:.4f}" for nll in row["nll_by_tier"])
        )
    table.add_section()
    table.add_row("all", *(f"{tier['nll']:.4f}" for tier in report["tiers"]))
    table.add_row("quality", *(f"{tier['quality']:.4f}" for tier in report["tiers"]))
    console.print(table)
    metrics = report["difficulty"]
    partial, plain = metrics["partial_spearman_by_tier"][0], metrics["spearman_by_tier"][0]
    console.print(
        f"difficulty against quality lost at the base tier: Spearman {_number(plain)}, "
        f"partial given log length {_number(partial)} "
        f"(length alone {_number(metrics['length_spearman_by_tier'][0])})"
    )
    console.print(
        f"report      {out / 'report.json'}\ncheckpoint  {out / 'checkpoint'}", soft_wrap=True
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
