"""The calibration report beside a checkpoint: the frontier that the dashboard shows."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dvpa.tiers.tier_map import TierMap

logger = logging.getLogger(__name__)
MAX_BYTES = 16 * 2**20


def find_report(checkpoint: Path, given: str | None) -> Path | None:
    """The report's file: as given, else `dvpa calibrate`'s, else report.json in or beside the
    checkpoint folder.

    Raises:
        FileNotFoundError: the given one is not there.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"report: {given}: no such file")
        return Path(given)
    folders = (checkpoint / "calibration", checkpoint, checkpoint.resolve().parent)
    near = [folder / "report.json" for folder in folders]
    return next((path for path in near if path.is_file()), None)


def read_report(path: str | Path) -> dict[str, Any] | None:
    """The report, or None (logged) for a file that is none: serving does not depend on it."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("report %s is not shown: %s", path.name, error)
        return None
    return report if isinstance(report, dict) else None


def frontier(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Quality against activated parameters: the tiers, and the routers' curves.

    None where there is no report, or one of another shape.
    """
    if report is None:
        return None
    try:
        tiers = [
            {"name": str(t["name"]), "cost": _number(t["activated_params"]),
             "quality": _number(t["quality"])}
            for t in report["tiers"]
        ]  # fmt: skip
        curves = {
            str(name): {"cost": _numbers(curve["cost"]), "quality": _numbers(curve["quality"])}
            for name, curve in report.get("frontier", {}).items()
        }
        routers = {
            name: {"cost": _number(report["routers"][name]["mean_activated_params"]),
                   "quality": _number(report["routers"][name]["quality"])}
            for name in ("adaptive", "random", "length")
            if name in report.get("routers", {})
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("the report's frontier is not shown: %s", type(error).__name__)
        return None
    return {**curves, "tiers": tiers, "routers": routers}


def regions(tier_map: TierMap) -> list[dict[str, float | int]]:
    """Where each tier begins on the scale of difficulty, to a thousandth; both kinds of maps."""
    grid = np.linspace(0.0, 1.0, 1001)
    tiers = tier_map.tiers(grid)
    starts = [0, *(np.flatnonzero(np.diff(tiers)) + 1).tolist()]
    return [{"from": float(grid[at]), "tier": int(tiers[at])} for at in starts]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _numbers(values: Sequence[Any]) -> list[float]:
    return [_number(value) for value in values]
