"""A study's results for the documentation: a summary of its JSON, its figures, its page's part.

python scripts/ablation_page.py runs/ablate/nano
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURES = (
    "frontier", "calibration", "risk_coverage", "confusion", "thresholds", "load", "flops"
)  # fmt: skip
_OF_ROW = (
    "name", "recipe", "map", "budget", "notes", "infeasible", "goals", "minus_reference", "cpt",
    "ece_by_tier", "tier_share", "quality", "relative_cost", "quality_kept", "apgr",
    "mixed_kind_apgr", "gap_at_oracle", "budget_deviation", "aurc", "stay_low_rate",
)  # fmt: skip
_OF_MODEL = ("recipe", "seed", "training_flops", "stage_seconds")
Part = tuple[str, list[str], list[list[str]]]


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the documentation shows of results.json; an architecture study is short as it is."""
    if results.get("kind") == "architecture":
        return _rounded(results)
    rows = [{k: row[k] for k in _OF_ROW if k in row} for row in results["configurations"]]
    rows[0]["routers"] = results["configurations"][0].get("routers", {})
    models = []
    for model in results["models"]:
        own = {key: model[key] for key in _OF_MODEL}
        own["quality"] = [tier["quality"] for tier in model["tiers"]]
        own["max_violation"] = {
            name: load["max_violation"] for name, load in model.get("load", {}).items()
        }
        models.append(own)
    surfaces = [
        {key: surface[key] for key in ("tiers", "cost", "best", "at_this_cost") if key in surface}
        for surface in results.get("surfaces", [])
    ]
    kept = ("title", "study", "seeds", "reference", "environment")
    return _rounded(
        {key: results[key] for key in kept}
        | {"tiers": [tier["name"] for tier in results["models"][0]["tiers"]]}
        | {"configurations": rows, "surfaces": surfaces, "models": models}
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def ablation_parts(result: Mapping[str, Any]) -> list[Part]:
    """(text, head, rows) of a study of recipes and maps."""
    rows = result["configurations"]
    text = (
        f"`dvpa ablate ablation/{result['study']['name']}.yaml`: {len(rows)} configurations, seeds "
        f"{', '.join(map(str, result['seeds']))}. Means over seeds; *minus reference*: quality "
        f"minus that of {result['reference']}, paired by request and seed, with its 95 % "
        "bootstrap interval over both."
    )
    head = ["configuration", "budget", "quality", "of top", "off by", "APGR", "mixed kind", "ECE"]
    lines = []
    for row in rows:
        cells = [row["name"], row["budget"] or "none"]
        if "infeasible" in row:
            lines.append([*cells, row["infeasible"], *[""] * 6])
            continue
        off, ece = row["budget_deviation"]["mean"], [tier["mean"] for tier in row["ece_by_tier"]]
        lines.append([
            *cells, f"{row['quality']['mean']:.3f}", f"{row['relative_cost']['mean']:.1%}",
            "" if off is None else f"{off:+.1%}", f"{row['apgr']['mean']:.2f}",
            f"{row['mixed_kind_apgr']['mean']:.2f}", f"{max(ece):.3f}",
            _signed(row.get("minus_reference", {}).get("quality")),
        ])  # fmt: skip
    routers = [
        [
            name.replace("_", " "),
            f"{row['quality']['mean']:.3f}",
            f"{row['relative_cost']['mean']:.1%}" if "relative_cost" in row else "",
            _signed(row.get("adaptive_minus")),
        ]
        for name, row in rows[0].get("routers", {}).items()
    ]
    goals = [
        [
            name.replace("_", " "),
            "" if goal["value"] is None else f"{goal['value']:.4f}",
            f"{goal['bound']:g}" if "bound" in goal else "interval above 0",
            {True: "yes", False: "**no**", None: "undefined"}[goal["holds"]],
        ]
        for name, goal in rows[0].get("goals", {}).items()
    ]
    return [
        (text, [*head, "minus reference"], lines),
        (f"Goals, {result['reference']}:", ["goal", "value", "wanted", "holds"], goals),
        (
            f"Routers at equal cost, {result['reference']}:",
            ["router", "quality", "of top's cost", "adaptive minus this"],
            routers,
        ),
    ]


def architecture_part(result: Mapping[str, Any]) -> Part:
    """(text, head, rows) of a study of architectures."""
    text = (
        f"`dvpa ablate ablation/{result['study']['name']}.yaml`, seeds "
        f"{', '.join(map(str, result['seeds']))}: nats per token of {result['scored_tokens']:,} "
        "held-out tokens; equal steps and examples. *Minus reference*: nll minus that of "
        f"{result['reference']}'s top tier, paired by passage and seed, with its 95 % bootstrap "
        "interval over both."
    )
    head = ["architecture", "total", "activated", "MFLOPs a token", "training TFLOPs", "nll"]
    rows = [
        [
            row["label"],
            f"{row['total_params'] / 1e3:.0f}k",
            f"{row['activated_params'] / 1e3:.0f}k",
            f"{row['flops_per_token'] / 1e6:.2f}",
            f"{row['training_flops'] / 1e12:.2f}",
            f"{row['nll']['mean']:.4f}",
            _signed(row.get("minus_reference")),
        ]
        for row in result["architectures"]
    ]
    return text, [*head, "minus reference"], rows


def _signed(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = found["ci95"]
    return f"{found['difference']:+.3f} ({low:+.3f} .. {high:+.3f})"


def main() -> None:
    """Copy a finished study into docs/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="a study's folder")
    folder = parser.parse_args().study
    summary = summarise(json.loads((folder / "results.json").read_text()))
    name = summary["study"]["name"]
    text = json.dumps(summary, separators=(",", ":"))
    (DOCS / "benchmarks" / f"ablation_{name}.json").write_text(text + "\n")
    for figure in FIGURES:
        if (folder / f"{figure}.png").is_file():
            target = DOCS / "images" / f"ablation-{name}-{figure.replace('_', '-')}.png"
            shutil.copyfile(folder / f"{figure}.png", target)


if __name__ == "__main__":
    main()
