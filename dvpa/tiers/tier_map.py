"""TierMap: one raw difficulty in [0, 1] -> a tier. A JSON file beside the weights; no torch.

Two kinds behind one interface (design.md section 4, reference/methods.md F6):

* `threshold`: tier = number of thresholds <= d; above `upper_cut` the request is taken as hopeless
  and gets the base tier.
* `gain`: argmax over t of P_t(d) - gain_lambda * C_t / C_top, ties to the cheaper tier. Hopeless
  requests go to the base tier by themselves, since no tier gains anything on them.

P_t are per-tier isotonic curves, piecewise linear, decreasing in d, made nondecreasing in t by a
running maximum. Where a guard is recorded, a tier below the top is used only where its expected
loss against the top, P_top(d) - P_t(d), is at most that tier's cut. Fitting lives in calibrate.py,
NaN handling in policy.py.

N requests, T tiers.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

VERSION = 1
KINDS = ("threshold", "gain")
NEVER = 2.0  # a threshold no difficulty reaches; JSON has no infinity

Floats = npt.NDArray[np.float64]
Tiers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Curve = tuple[tuple[float, ...], tuple[float, ...]]  # knots x (difficulty) and y (P(success))


def gain_choice(success: Floats, costs: Floats, gain_lambda: float, allowed: Bools) -> Tiers:
    """argmax_t success - gain_lambda * costs over the allowed tiers, ties to the cheaper.

    success [N, T]; costs [T] as fractions of the top tier's; allowed [N, T]. Returns int64 [N].
    """
    value = np.where(allowed, success - gain_lambda * costs, -np.inf)
    best: Tiers = value.argmax(axis=1).astype(np.int64)  # the first of equals: the cheapest
    return best


def guard_allows(success: Floats, cuts: Sequence[float] | None) -> Bools:
    """Bool [N, T]: where the guard accepts each tier; the top tier is always accepted.

    success [N, T]; cuts [T - 1] bound the expected loss against the top tier, None for no guard.
    """
    allowed = np.ones(success.shape, dtype=np.bool_)
    if cuts is not None:
        allowed[:, :-1] = success[:, -1:] - success[:, :-1] <= np.asarray(cuts, dtype=np.float64)
    return allowed


def raise_to_allowed(tiers: Tiers, allowed: Bools) -> Tiers:
    """Each tier [N], or the next one up that `allowed` [N, T] accepts there."""
    raised = tiers.copy()
    for tier in range(allowed.shape[1] - 1):
        raised[(raised == tier) & ~allowed[:, tier]] = tier + 1
    return raised


@dataclass(frozen=True)
class TierMap:
    """Difficulty -> tier, with the calibration that explains the choice.

    Construction validates every field and raises one ValueError that names the field, its value and
    what is allowed, whether the map is built in code or read from a file.
    """

    kind: str  # "threshold" or "gain"
    tier_names: tuple[str, ...]  # base first
    costs: tuple[float, ...]  # activated parameters per tier, strictly increasing
    default_tier: int  # where requests without a usable difficulty go
    thresholds: tuple[float, ...] = ()  # T - 1, nondecreasing, up to NEVER; empty for a gain map
    upper_cut: float | None = None  # threshold maps: d above it is hopeless, base tier
    gain_lambda: float | None = (
        None  # gain maps: price of the top tier in success; None: not fitted yet
    )
    calibration: tuple[Curve, ...] = ()  # one curve per tier, or none at all
    guard: dict[str, Any] | None = None  # {alpha, delta, cuts [T - 1], ...}
    budget: dict[str, Any] | None = None  # what the map was fitted for (informative)
    statistics: dict[str, Any] | None = None  # what it does on the calibrate split (informative)

    def __post_init__(self) -> None:
        validate(self)
        for name in ("guard", "budget", "statistics"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))

    @classmethod
    def untrained(cls, tier_names: Sequence[str], costs: Sequence[float]) -> "TierMap":
        """A map with no calibration: every request goes to the default (top) tier."""
        return cls("gain", tuple(tier_names), tuple(float(c) for c in costs), len(tier_names) - 1)

    @property
    def num_tiers(self) -> int:
        """Number of tiers T."""
        return len(self.tier_names)

    @property
    def is_fitted(self) -> bool:
        """False for a map that only knows its default tier."""
        return self.kind == "threshold" or self.gain_lambda is not None

    def tier(self, d: float) -> int:
        """The tier for one difficulty. ValueError if it is NaN or outside [0, 1]."""
        return int(self.tiers(np.array([d], dtype=np.float64))[0])

    def tiers(self, d: npt.ArrayLike) -> Tiers:
        """The tier of each difficulty: [N] -> int64 [N]. ValueError if one is outside [0, 1]."""
        d = _difficulties(d)
        if not self.is_fitted:
            return np.full(d.shape, self.default_tier, dtype=np.int64)
        if self.kind == "gain":
            success = self.success(d)
            costs = np.asarray(self.costs) / self.costs[-1]
            return gain_choice(
                success, costs, self.gain_lambda or 0.0, guard_allows(success, self._cuts)
            )
        tiers = np.searchsorted(self.thresholds, d, side="right").astype(np.int64)
        if self.upper_cut is not None:
            tiers[d > self.upper_cut] = 0
        if self._cuts is not None:
            tiers = raise_to_allowed(tiers, guard_allows(self.success(d), self._cuts))
        return tiers

    def success(self, d: npt.ArrayLike) -> Floats:
        """Calibrated P(success) per tier: [N] -> float64 [N, T], or [N, 0] without calibration.

        Nonincreasing in d and, by a running maximum, nondecreasing in the tier.
        """
        d = _difficulties(d)
        if not self.calibration:
            return np.empty((d.size, 0))
        curves = np.stack([_interpolate(d, x, y) for x, y in self._knots], axis=1)
        return np.maximum.accumulate(curves, axis=1)

    def success_by_tier(self, d: float) -> tuple[float, ...]:
        """Calibrated P(success) of every tier for one difficulty; empty without calibration."""
        return tuple(self.success(np.array([d], dtype=np.float64))[0].tolist())

    def to_json(self) -> str:
        """The map as JSON; floats keep every bit."""
        content = {"version": VERSION, **{f.name: getattr(self, f.name) for f in fields(self)}}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "TierMap":
        """Read what to_json wrote. ValueError, and nothing else, for an invalid tier map."""
        return cls(**parse(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map atomically: a reader sees the old file or the new one, never a part."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TierMap":
        """Read a map. OSError if it cannot be read, ValueError naming the file if invalid."""
        data = Path(path).read_bytes()
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @cached_property
    def _knots(self) -> list[tuple[Floats, Floats]]:
        return [
            (np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
            for x, y in self.calibration
        ]

    @property
    def _cuts(self) -> Sequence[float] | None:
        return None if self.guard is None else self.guard["cuts"]


def _difficulties(d: npt.ArrayLike) -> Floats:
    """float64 [N], checked to lie in [0, 1]."""
    values = np.asarray(d, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"difficulty: shape {values.shape} is not [N]")
    bad = ~((values >= 0.0) & (values <= 1.0))  # true for NaN as well
    if bad.any():
        raise ValueError(f"difficulty: {values[bad][0]} is outside [0, 1]")
    return values


def _interpolate(d: Floats, x: Floats, y: Floats) -> Floats:
    """Piecewise-linear curve through (x, y), constant outside; exactly monotone when y is.

    Not np.interp: each value is clipped to its segment's ends, so rounding cannot break
    monotonicity, and the result of one element does not depend on how many are evaluated with it.
    """
    above = np.searchsorted(x, d, side="right")
    low, high = np.maximum(above - 1, 0), np.minimum(above, len(x) - 1)
    span = x[high] - x[low]
    weight = np.where(span > 0, (d - x[low]) / np.where(span > 0, span, 1.0), 0.0)
    return np.clip(y[low] + (y[high] - y[low]) * weight, y[high], y[low])


def _fail(field: str, value: object, allowed: str) -> NoReturn:
    shown = repr(value)
    raise ValueError(f"tier map: {field}: {shown[:80]} is not {allowed}")


def _plain(name: str, value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A private copy in the form JSON gives back, so that saving and loading compares equal."""
    if value is None:
        return None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"tier map: {name}: {error}") from error
    return plain


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _check_numbers(
    field: str, value: object, low: float, high: float, length: int | None = None
) -> None:
    """A tuple or list of finite numbers in [low, high], of the given length."""
    if not isinstance(value, tuple | list):
        _fail(field, value, "a list of numbers")
    if length is not None and len(value) != length:
        _fail(field, value, f"of length {length}")
    for item in value:
        if not _is_number(item, low, high) or not isfinite(item):
            _fail(field, item, f"a number from {low:g} to {high:g}")


def _check_order(
    field: str, values: Sequence[float], before: Callable[[float, float], bool], order: str
) -> None:
    for left, right in pairwise(values):
        if not before(left, right):
            _fail(field, [left, right], order)


def validate(tier_map: TierMap) -> None:
    """Check every field of a map against the others; ValueError for the first that is wrong."""
    names, num_tiers = tier_map.tier_names, len(tier_map.tier_names)
    if tier_map.kind not in KINDS:
        _fail("kind", tier_map.kind, f"one of {', '.join(KINDS)}")
    if (
        num_tiers == 0
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != num_tiers
    ):
        _fail("tier_names", names, "a list of distinct non-empty names")
    _check_numbers("costs", tier_map.costs, 0.0, 1e300, num_tiers)
    _check_order(
        "costs", (0.0, *tier_map.costs), lambda a, b: a < b, "positive and strictly increasing"
    )
    default = tier_map.default_tier
    if not isinstance(default, int) or isinstance(default, bool) or not 0 <= default < num_tiers:
        _fail("default_tier", default, f"a tier index from 0 to {num_tiers - 1}")
    is_gain = tier_map.kind == "gain"
    _check_numbers("thresholds", tier_map.thresholds, 0.0, NEVER, 0 if is_gain else num_tiers - 1)
    _check_order("thresholds", tier_map.thresholds, lambda a, b: a <= b, "in nondecreasing order")
    if tier_map.upper_cut is not None and (is_gain or not _is_number(tier_map.upper_cut, 0.0, 1.0)):
        _fail(
            "upper_cut",
            tier_map.upper_cut,
            "null (gain maps) or a number from 0 to 1 (threshold maps)",
        )
    if tier_map.gain_lambda is not None and not (
        is_gain and _is_number(tier_map.gain_lambda, 0.0, 1e300)
    ):
        _fail(
            "gain_lambda",
            tier_map.gain_lambda,
            "null (threshold maps) or a number >= 0 (gain maps)",
        )
    if len(tier_map.calibration) not in (0, num_tiers):
        _fail(
            "calibration", tier_map.calibration, f"one curve for each of {num_tiers} tiers, or none"
        )
    if not tier_map.calibration and (
        tier_map.gain_lambda is not None or tier_map.guard is not None
    ):
        _fail(
            "calibration",
            tier_map.calibration,
            "enough for a fitted gain map or a guard, which need the curves",
        )
    for tier, curve in enumerate(tier_map.calibration):
        field = f"calibration[{tier}]"
        if not isinstance(curve, tuple) or len(curve) != 2:
            _fail(field, curve, "a pair of knot lists [x, y]")
        _check_numbers(f"{field} x", curve[0], 0.0, 1.0)
        _check_numbers(f"{field} y", curve[1], 0.0, 1.0, max(len(curve[0]), 1))
        _check_order(f"{field} x", curve[0], lambda a, b: a < b, "strictly increasing")
        _check_order(f"{field} y", curve[1], lambda a, b: a >= b, "nonincreasing")
    for name in ("guard", "budget", "statistics"):
        content = getattr(tier_map, name)
        if content is not None and not isinstance(content, dict):
            _fail(name, content, "null or an object")
    if tier_map.guard is not None:
        _check_numbers("guard.cuts", tier_map.guard.get("cuts"), -1.0, 1.0, num_tiers - 1)
        for key in ("alpha", "delta"):
            if not _is_number(tier_map.guard.get(key), 0.0, 1.0):
                _fail(f"guard.{key}", tier_map.guard.get(key), "a number from 0 to 1")


def parse(text: str | bytes) -> dict[str, Any]:
    """The fields of a TierMap from JSON, not yet validated; ValueError if they are not there."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        content = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"tier map: not valid JSON: {error}") from error
    if not isinstance(content, Mapping):
        _fail("file", content, "a JSON object")
    names = {"version", *(f.name for f in fields(TierMap))}
    missing, unknown = names - content.keys(), content.keys() - names
    if missing:
        raise ValueError(f"tier map: missing field {', '.join(sorted(missing))}")
    if unknown:
        allowed = ", ".join(sorted(names))
        raise ValueError(
            f"tier map: unknown field {', '.join(sorted(map(repr, unknown)))}; allowed: {allowed}"
        )
    if content["version"] != VERSION or isinstance(content["version"], bool):
        _fail("version", content["version"], f"{VERSION}, the version this dvpa reads")
    values = {name: content[name] for name in names - {"version"}}
    for name in ("tier_names", "costs", "thresholds", "calibration"):
        if not isinstance(values[name], list):
            _fail(name, values[name], "a list")
    for name in ("tier_names", "costs", "thresholds"):
        values[name] = tuple(values[name])
    values["calibration"] = tuple(
        tuple(tuple(knots) if isinstance(knots, list) else knots for knots in curve)
        if isinstance(curve, list)
        else curve
        for curve in values["calibration"]
    )
    return values
