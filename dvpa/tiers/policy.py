"""Policy: the run-time decision from tier map, override, load and caps, and which decided.

Order, each step recorded only when it changes the tier:

1. `override`: the client named a tier; load does not lower it. Otherwise `tier_map`, or `fallback`
   (the map's default tier) when the difficulty is missing, NaN or outside [0, 1], or when the map
   is not fitted. A client that asks for a `quality` gets the map's calibration instead of its cuts:
   the cheapest tier whose calibrated success is at least that share of the top tier's.
2. `load`: above `degrade_from` the highest tier still given falls linearly, to the base tier at
   load 1. Only the requests above that ceiling are lowered; the ones the map keeps cheap are not
   touched.
3. `cap`: max_tier and min_tier, last because they are promises to the client or limits of the
   account.

Left out: escalation while decoding, which belongs to the engine and changes `decided_by` there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

from dvpa.tiers.tier_map import TierMap


@dataclass(frozen=True)
class Decision:
    """The tier one request gets and why."""

    tier: int
    tier_name: str
    decided_by: str  # tier_map | override | cap | load | fallback
    difficulty: float | None  # None: missing or not usable
    success_by_tier: tuple[float, ...]  # calibrated; empty without difficulty or calibration
    thresholds: tuple[float, ...]  # empty for a gain map


def tier_index(tier: int | str, tier_names: Sequence[str], field: str = "tier") -> int:
    """Index of a tier given by name or index ("2" counts as 2 unless it is a name).

    ValueError naming the known tiers if there is no such tier.
    """
    if isinstance(tier, str) and tier in tier_names:
        return list(tier_names).index(tier)
    if isinstance(tier, str) and tier.isascii() and tier.isdigit() and len(tier) < 10:
        tier = int(tier)
    if isinstance(tier, int) and not isinstance(tier, bool) and 0 <= tier < len(tier_names):
        return tier
    known = ", ".join(f"{name} ({index})" for index, name in enumerate(tier_names))
    raise ValueError(f"{field}: {tier!r} is not a tier; known tiers: {known}")


class Policy:
    """Decides the tier of each request and counts the reasons.

    tier_map: the fitted (or untrained) map. allow_degradation: whether load may lower tiers.
    degrade_from: the load, in [0, 1), above which it does. `counters` maps each reason to the
    number of decisions; `fallback` counts every unusable difficulty, also where load or a cap then
    decided.
    """

    def __init__(
        self, tier_map: TierMap, *, allow_degradation: bool = True, degrade_from: float = 0.8
    ) -> None:
        if not 0.0 <= degrade_from < 1.0:
            raise ValueError(f"degrade_from: {degrade_from} is outside [0, 1)")
        self.tier_map = tier_map
        self.allow_degradation = allow_degradation
        self.degrade_from = degrade_from
        self.counters: dict[str, int] = dict.fromkeys(
            ("tier_map", "override", "cap", "load", "fallback"), 0
        )

    def decide(
        self,
        difficulty: float | None,
        *,
        tier: int | str | None = None,
        max_tier: int | str | None = None,
        min_tier: int | str | None = None,
        quality: float | None = None,
        load: float = 0.0,
    ) -> Decision:
        """Decide one request.

        difficulty: the head's raw score; None, NaN or outside [0, 1] means fallback. tier: a name
        or index to override the map, None or "auto" to let it decide. max_tier, min_tier: names or
        indices. quality: share of the top tier's success to keep, in [0, 1]; None leaves it to the
        map. load: 0 idle, 1 full (more is full too). ValueError for an unknown tier, min_tier
        above max_tier, a bad load or quality, or a quality where the map has no calibration.
        """
        tier_map, names = self.tier_map, self.tier_map.tier_names
        highest = len(names) - 1 if max_tier is None else tier_index(max_tier, names, "max_tier")
        lowest = 0 if min_tier is None else tier_index(min_tier, names, "min_tier")
        if lowest > highest:
            raise ValueError(f"min_tier: {min_tier!r} is above max_tier {max_tier!r}")
        if not (isfinite(load) and load >= 0.0):
            raise ValueError(f"load: {load} is not a finite number >= 0")
        if quality is not None:
            self.check_quality(quality)
        score = None if difficulty is None else float(difficulty)
        if score is not None and not 0.0 <= score <= 1.0:  # also true for NaN
            score = None

        fell_back = False
        if tier is not None and tier != "auto":
            chosen, decided_by = tier_index(tier, names), "override"
        else:
            fell_back = score is None or not (tier_map.is_fitted or quality is not None)
            if score is None or fell_back:
                chosen, decided_by = tier_map.default_tier, "fallback"
            elif quality is not None:
                success = tier_map.success_by_tier(score)
                chosen = next(t for t, p in enumerate(success) if p >= quality * success[-1])
                decided_by = "tier_map"
            else:
                chosen, decided_by = tier_map.tier(score), "tier_map"
            ceiling = self._load_ceiling(load)
            if chosen > ceiling:
                chosen, decided_by = ceiling, "load"
        capped = min(max(chosen, lowest), highest)
        if capped != chosen:
            chosen, decided_by = capped, "cap"

        self.counters[decided_by] += 1
        if fell_back and decided_by != "fallback":
            self.counters["fallback"] += 1
        return Decision(
            tier=chosen,
            tier_name=names[chosen],
            decided_by=decided_by,
            difficulty=score,
            success_by_tier=() if score is None else tier_map.success_by_tier(score),
            thresholds=tier_map.thresholds,
        )

    def check_quality(self, quality: float) -> None:
        """ValueError if this share of the top tier's success cannot be asked for."""
        if not 0.0 <= quality <= 1.0:
            raise ValueError(f"quality: {quality} must be in 0 .. 1")
        if not self.tier_map.calibration:
            raise ValueError(
                f"quality: {quality} cannot be had, the tier map has no calibrated success by tier"
            )

    def _load_ceiling(self, load: float) -> int:
        """The highest tier given at this load."""
        top = self.tier_map.num_tiers - 1
        if not self.allow_degradation or load <= self.degrade_from:
            return top
        return top - min(top, ceil(top * (load - self.degrade_from) / (1.0 - self.degrade_from)))
