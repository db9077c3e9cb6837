"""Difficulty -> tier: the map, how it is fitted, the run-time policy, telemetry. No torch."""

from importlib import import_module
from typing import Any

from dvpa.tiers.policy import Decision, Policy
from dvpa.tiers.record import TelemetryRecord
from dvpa.tiers.tier_map import TierMap

# Fitting needs scipy and scikit-learn, serving does not: these names load on first use.
_CALIBRATE = ("Budget", "Split", "brier_score", "expected_calibration_error", "fit_tier_map")
__all__ = ["Decision", "Policy", "TelemetryRecord", "TierMap", *_CALIBRATE]


def __getattr__(name: str) -> Any:
    if name not in _CALIBRATE:
        raise AttributeError(f"module 'dvpa.tiers' has no attribute {name!r}")
    return getattr(import_module("dvpa.tiers.calibrate"), name)
