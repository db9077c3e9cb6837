"""Assembly recipes: which parents, which share of each, for which tensors.

```yaml
parents: {v3: path/to/v3, r1: path/to/r1}
base: v3                # names, dtypes, shard layout and every verbatim copy come from it
delta: 0.0              # difference from the base below which the base tensor is kept
expert_delta: 0.0       # the same for a routed expert as a whole
rules:                  # the first that matches decides; the last must match everything
  - {match: routed_experts, lambda: {v3: 0.0, r1: 1.0}}
  - {match: all, lambda: {v3: 1.0}}
```
A rule may add `layers: 10-60`, `experts: 0-63`, `regex: "..."` (searched in the name), `delta` and
`expert_delta` of its own; everything it says must hold. A parent left out of `lambda` has 0.
Differences are || W - W_base ||_F / sqrt(numel), the root mean square of the elements' differences,
as in Assembly of Experts (arXiv 2506.14794).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvpa.architecture import find_config, load_yaml
from dvpa.checkpoint.tensor_class import CLASSES, Place

ALL = "all"
_KEYS = ("parents", "base", "delta", "expert_delta", "rules")
_RULE_KEYS = ("match", "lambda", "layers", "experts", "regex", "delta", "expert_delta")
_SUM_TOLERANCE = 1e-6
_SPAN = re.compile(r"(\d+)\s*-\s*(\d+)")


@dataclass(frozen=True)
class Rule:
    """Which tensors, and how the parents share in them.

    `shares` are the recipe's lambda, in the order of its parents; `delta` and `expert_delta` are
    the recipe's where the rule has none.
    """

    match: str
    shares: tuple[float, ...]
    layers: range | None = None
    experts: range | None = None
    regex: re.Pattern[str] | None = None
    delta: float = 0.0
    expert_delta: float = 0.0

    def takes(self, name: str, place: Place) -> bool:
        """Whether the rule is about this tensor."""
        return (
            self.match in (ALL, place.tensor_class)
            and (self.layers is None or place.layer in self.layers)
            and (self.experts is None or place.expert in self.experts)
            and (self.regex is None or self.regex.search(name) is not None)
        )

    def describe(self) -> str:
        """The condition as one would write it."""
        parts = [self.match]
        for name, span in (("layers", self.layers), ("experts", self.experts)):
            parts += [] if span is None else [f"{name} {span.start}-{span.stop - 1}"]
        parts += [] if self.regex is None else [f"regex {self.regex.pattern}"]
        parts += [f"delta {self.delta:g}"] if self.delta else []
        parts += [f"expert_delta {self.expert_delta:g}"] if self.expert_delta else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `base` is a name of `parents`."""

    parents: dict[str, Path]
    base: str
    rules: tuple[Rule, ...]
    name: str = field(default="recipe", compare=False)

    @property
    def base_index(self) -> int:
        """Where the base stands among the parents."""
        return list(self.parents).index(self.base)

    def rule_of(self, name: str, place: Place) -> int:
        """Index of the first rule that takes the tensor; the last one takes all."""
        return next(i for i, rule in enumerate(self.rules) if rule.takes(name, place))

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the result, in plain JSON types."""
        return {
            "parents": {name: str(path) for name, path in self.parents.items()},
            "base": self.base,
            "rules": [
                {
                    "match": rule.describe(),
                    "lambda": dict(zip(self.parents, rule.shares, strict=True)),
                    "delta": rule.delta,
                    "expert_delta": rule.expert_delta,
                }
                for rule in self.rules
            ],
        }


def load_recipe(path: str | Path, parents: Mapping[str, str | Path] | None = None) -> Recipe:
    """Read and check a recipe; `parents` replaces folders of parents it names.

    Raises:
        FileNotFoundError: no such file, here or below `configs/`.
        ValueError: an unknown key, or a value out of range; the message names the key.
    """
    path = find_config(path)
    try:
        return parse_recipe(load_yaml(path), parents, path.stem)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from None


def parse_recipe(
    data: Mapping[str, Any],
    parents: Mapping[str, str | Path] | None = None,
    name: str = "recipe",
) -> Recipe:
    """A recipe from the mapping that its YAML holds; see `load_recipe`."""
    _check_keys(data, _KEYS, "")
    folders = _parents(data.get("parents"), parents or {})
    base = data.get("base")
    if not isinstance(base, str) or base not in folders:
        raise ValueError(f"base: {base!r} must be one of {', '.join(folders)}")
    listed = data.get("rules")
    if not isinstance(listed, list) or not listed:
        raise ValueError("rules: must be a list with at least one rule")
    limits = {key: _limit(data, key, 0.0, "") for key in ("delta", "expert_delta")}
    rules = tuple(_rule(rule, f"rules[{i}]", folders, limits) for i, rule in enumerate(listed))
    last = rules[-1]
    if last.match != ALL or (last.layers, last.experts, last.regex) != (None, None, None):
        raise ValueError(
            f"rules[{len(rules) - 1}]: the last rule must match everything: match: {ALL}, without "
            "layers, experts or regex"
        )
    return Recipe(folders, base, rules, name)


def _parents(given: Any, replaced: Mapping[str, str | Path]) -> dict[str, Path]:
    if not isinstance(given, Mapping) or len(given) < 2:
        raise ValueError("parents: must map two names or more to folders")
    for name in replaced:
        if name not in given:
            known = ", ".join(map(str, given))
            raise ValueError(f"parents.{name}: unknown parent; the recipe names {known}")
    folders = {}
    for name, folder in {**given, **replaced}.items():
        if not isinstance(name, str) or not isinstance(folder, str | Path) or not str(folder):
            raise ValueError(f"parents.{name}: {folder!r} must be a folder, its name a word")
        folders[name] = Path(folder)
    return folders


def _rule(data: Any, where: str, parents: Mapping[str, Path], limits: Mapping[str, float]) -> Rule:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: {data!r} must be a mapping with match and lambda")
    _check_keys(data, _RULE_KEYS, f"{where}.")
    match = data.get("match")
    if match not in (ALL, *CLASSES):
        raise ValueError(f"{where}.match: {match!r} must be one of {ALL}, {', '.join(CLASSES)}")
    return Rule(
        match=match,
        shares=_shares(data.get("lambda"), f"{where}.lambda", parents),
        layers=_span(data.get("layers"), f"{where}.layers"),
        experts=_span(data.get("experts"), f"{where}.experts"),
        regex=_regex(data.get("regex"), f"{where}.regex"),
        delta=_limit(data, "delta", limits["delta"], f"{where}."),
        expert_delta=_limit(data, "expert_delta", limits["expert_delta"], f"{where}."),
    )


def _shares(given: Any, where: str, parents: Mapping[str, Path]) -> tuple[float, ...]:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{where}: {given!r} must map parents to their shares")
    for name, share in given.items():
        if name not in parents:
            raise ValueError(f"{where}.{name}: unknown parent; known: {', '.join(parents)}")
        if not _is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"{where}.{name}: {share!r} must be a number in 0 .. 1")
    total = math.fsum(given.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(f"{where}: sums to {total:g}, must sum to 1")
    return tuple(float(given.get(name, 0.0)) for name in parents)


def _span(given: Any, where: str) -> range | None:
    """`10-60`, both ends included, or one number."""
    if given is None:
        return None
    match = _SPAN.fullmatch(given.strip()) if isinstance(given, str) else None
    if match:
        low, high = int(match[1]), int(match[2])
    elif isinstance(given, int) and not isinstance(given, bool):
        low = high = given
    else:
        low, high = 0, -1
    if not 0 <= low <= high:
        raise ValueError(f"{where}: {given!r} must be a number or FIRST-LAST, as in 10-60")
    return range(low, high + 1)


def _regex(given: Any, where: str) -> re.Pattern[str] | None:
    if given is None:
        return None
    try:
        return re.compile(given)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}: {given!r} is no regular expression: {error}") from None


def _limit(data: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = data.get(key, default)
    if not _is_number(value) or value < 0:
        raise ValueError(f"{where}{key}: {value!r} must be a number, 0 or more")
    return float(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < math.inf  # unlike isfinite, also of integers beyond floats


def _check_keys(data: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in allowed:
            raise ValueError(f"{where}{key}: unknown key; allowed: {', '.join(allowed)}")
