"""What a report draws of the reference configuration: calibration, risk, thresholds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dvpa.ablate.measure import Point
from dvpa.ablate.models import load_model
from dvpa.ablate.surface import threshold_surfaces


def reference_details(
    points: Sequence[Point],
    same_map: Mapping[str, Sequence[Point]],
    folders: Sequence[Path],
) -> dict[str, Any]:
    """`calibration`, `risk_coverage` and `surfaces` of a study; {} where the map was infeasible.

    Args:
        points: the reference's, by seed.
        same_map: those of the reference's map on every recipe, the reference's first.
        folders: of the models behind `points`.
    """
    if any("infeasible" in result for result, _ in points):
        return {}
    cost = float(np.mean([result["relative_cost"] for result, _ in points]))
    surfaces = threshold_surfaces([load_model(folder) for folder in folders], cost)
    return {
        "calibration": [
            {"seed": result["seed"], **result["reliability"]} for result, _ in points
        ],
        "risk_coverage": [
            _risk(recipe, own)
            for recipe, own in same_map.items()
            if all("risk_coverage" in result for result, _ in own)
        ],
        "surfaces": surfaces,
    }  # fmt: skip


def _risk(recipe: str, points: Sequence[Point]) -> dict[str, Any]:
    """Curves by seed; `oracle`: of the order that knows each request's quality."""
    coverage = np.array(points[0][0]["risk_coverage"]["coverage"])
    oracle = []
    for _, values in points:
        best = np.sort(values["adaptive"])[::-1]
        counts = np.maximum(np.round(coverage * len(best)).astype(int), 1)
        oracle.append((1.0 - np.cumsum(best)[counts - 1] / counts).tolist())
    return {
        "recipe": recipe,
        "coverage": coverage.tolist(),
        "risk": [result["risk_coverage"]["risk"] for result, _ in points],
        "oracle": oracle,
    }
