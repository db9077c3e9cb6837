"""ABLATION.yaml -> the points of a study; strict: every error names its key.

A study is a list of recipe variants times a list of map variants times seeds; `grid` in a variant
makes it several, `random` takes a sample of the product. One of `kind: architecture` has no maps:
its variants are trained and compared by their nll.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dvpa.ablate.checks import (
    as_mapping,
    as_name,
    as_note,
    as_whole,
    check_number,
    reject_unknown,
)
from dvpa.architecture import find_config, load_yaml
from dvpa.engine.escalation import EscalationParams
from dvpa.tiers.budget import Budget
from dvpa.tiers.tier_map import KINDS

# Changes whenever a measurement means something else: what older ones cached is computed again.
MEASURE_VERSION = 1
_KINDS = ("maps", "architecture")
_ESCALATION = [field.name for field in fields(EscalationParams)]
_MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class RecipeVariant:
    """What is trained: keys of the recipe, and of the model file that it names, as `a.b.c`."""

    name: str
    set: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{key}={json.dumps(value)}" for key, value in self.set.items()]


@dataclass(frozen=True)
class MapVariant:
    """How a tier map is made from outcomes.

    tiers: names of those the map may use (one threshold fewer than tiers); empty: all. shares: no
    budget, but cuts at quantiles of the calibrate split's difficulties, so that each tier gets its
    share. cuts: difficulties, as they are. items: requests of each of the fit and calibrate splits,
    0 for all. escalation: fields of `dvpa.engine.EscalationParams`; the engine then answers the
    test requests and may move them up while it does.
    """

    name: str
    kind: str = "gain"
    budget: str = ""
    alpha: float | None = None
    delta: float = 0.1
    upper_cut: bool = False
    tiers: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    cuts: tuple[float, ...] = ()
    items: int = 0
    escalation: Mapping[str, Any] | None = None
    note: str = ""

    def key(self) -> str:
        """Tells maps apart whose names may be the same."""
        content = {k: v for k, v in asdict(self).items() if k not in ("name", "note")}
        if self.escalation is None:  # as keys were before there was one
            del content["escalation"]
        return digest({"version": MEASURE_VERSION, **content})

    def columns(self, tier_names: Sequence[str]) -> list[int]:
        """The tiers that the map may use, of a model with these.

        Raises:
            ValueError: a tier that the model does not have, or a list of the wrong length.
        """
        unknown = [name for name in self.tiers if name not in tier_names]
        if unknown:
            raise ValueError(f"tiers: {unknown[0]!r} is not one of {', '.join(tier_names)}")
        chosen = [t for t, name in enumerate(tier_names) if name in (self.tiers or tier_names)]
        for name, size in (("shares", len(chosen)), ("cuts", len(chosen) - 1)):
            given = getattr(self, name)
            if given and len(given) != size:
                raise ValueError(f"{name}: {list(given)} must have {size} numbers")
        return chosen


@dataclass(frozen=True)
class Configuration:
    """A recipe variant with a map variant."""

    recipe: RecipeVariant
    map: MapVariant

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.recipe.name} / {self.map.name}"


@dataclass(frozen=True)
class Study:
    """A whole ablation; `configurations[0]` is the reference that others are compared with.

    architectures: of a study of that kind, which has no configurations; `reference` names one.
    """

    name: str
    recipe: str
    configurations: tuple[Configuration, ...]
    seeds: tuple[int, ...]
    workers: int = 2
    resamples: int = 2000
    wandb_mode: str = "offline"
    architectures: tuple[RecipeVariant, ...] = ()
    reference: str = ""

    @property
    def recipes(self) -> list[RecipeVariant]:
        """Those in use, in order."""
        if self.architectures:
            return list(self.architectures)
        return list({c.recipe.name: c.recipe for c in self.configurations}.values())

    def maps_of(self, recipe: str) -> list[MapVariant]:
        """The maps that are put on models of a recipe variant."""
        return [c.map for c in self.configurations if c.recipe.name == recipe]


def digest(content: Any) -> str:
    """Twelve hex digits of plain JSON values."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        FileNotFoundError: no such file, here or below `configs/`.
        ValueError: not YAML, an unknown or missing key, a value out of range.
    """
    found = find_config(path)
    data = load_yaml(found)
    try:
        return parse_study(data, found.stem)
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from None


def parse_study(data: Mapping[str, Any], default_name: str) -> Study:
    """A study from its YAML's content. ValueError as `load_study`, without the file."""
    known = {"name", "kind", "recipe", "recipes", "seeds", "workers", "resamples", "wandb_mode"}
    kind = data.get("kind", "maps")
    if kind not in _KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(_KINDS)}")
    known |= {"reference"} if kind == "architecture" else {"maps", "reference", "random"}
    reject_unknown(data, known, "")
    if not isinstance(data.get("recipe"), str):
        raise ValueError("recipe: the name of a training recipe is missing")
    recipes = [
        r for i, item in enumerate(_list(data, "recipes")) for r in _recipes(item, f"recipes[{i}]")
    ]
    _reject_twins(recipes, "recipes")
    wandb_mode = data.get("wandb_mode", "offline")
    if wandb_mode not in _MODES:
        raise ValueError(f"wandb_mode: {wandb_mode!r} is not one of {', '.join(_MODES)}")
    study = Study(
        name=as_name(data.get("name", default_name), "name"),
        recipe=data["recipe"],
        configurations=(),
        seeds=_seeds(data.get("seeds", [0, 1, 2])),
        workers=as_whole(data.get("workers", 2), "workers", 1),
        resamples=as_whole(data.get("resamples", 2000), "resamples", 100),
        wandb_mode=wandb_mode,
    )
    if kind == "architecture":
        reference = _reference(data.get("reference"), {"recipe": recipes})["recipe"]
        return replace(study, architectures=tuple(recipes), reference=reference)
    maps = [m for i, item in enumerate(_list(data, "maps")) for m in _maps(item, f"maps[{i}]")]
    _reject_twins(maps, "maps")
    chosen = _reference(data.get("reference"), {"recipe": recipes, "map": maps})
    return replace(study, configurations=_product(recipes, maps, chosen, data.get("random")))


def _reference(given: Any, variants: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The names of the reference's recipe and map; the first of each where it says nothing."""
    chosen = {key: of_key[0].name for key, of_key in variants.items()}
    if given is not None:
        as_mapping(given, "reference")
        reject_unknown(given, set(variants), "reference.")
        chosen |= given
    for key, of_key in variants.items():
        names = [variant.name for variant in of_key]
        if chosen[key] not in names:
            raise ValueError(f"reference.{key}: {chosen[key]!r} is not one of {', '.join(names)}")
    return chosen


def _reject_twins(variants: Sequence[Any], key: str) -> None:
    names = [variant.name for variant in variants]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{key}: the name {twice[0]!r} comes twice")


def _product(
    recipes: Sequence[RecipeVariant],
    maps: Sequence[MapVariant],
    first: Mapping[str, str],
    sample: Any,
) -> tuple[Configuration, ...]:
    """The configurations, the reference first; a sample keeps it."""
    every = [Configuration(r, m) for r, m in itertools.product(recipes, maps)]
    every.sort(key=lambda c: (c.recipe.name, c.map.name) != (first["recipe"], first["map"]))
    if sample is None:
        return tuple(every)
    as_mapping(sample, "random")
    reject_unknown(sample, {"configurations", "seed"}, "random.")
    size = as_whole(sample.get("configurations"), "random.configurations", 1)
    if size > len(every):
        raise ValueError(f"random.configurations: {size} is more than the {len(every)} there are")
    draws = random.Random(as_whole(sample.get("seed", 0), "random.seed", 0))
    chosen = sorted(draws.sample(range(1, len(every)), size - 1))
    return (every[0], *(every[i] for i in chosen))


def _recipes(item: Any, where: str) -> list[RecipeVariant]:
    """One entry of `recipes`, or several by its grid over `set.KEY` and `model.KEY`."""
    as_mapping(item, where)
    reject_unknown(item, {"name", "set", "model", "note", "grid"}, f"{where}.")
    parts: dict[str, dict[str, Any]] = {}
    for part in ("set", "model"):
        parts[part] = dict(as_mapping(item.get(part) or {}, f"{where}.{part}"))
    base = RecipeVariant(
        as_name(item.get("name"), f"{where}.name"),
        parts["set"],
        parts["model"],
        as_note(item, where),
    )
    if "seed" in parts["set"]:
        raise ValueError(f"{where}.set.seed: the study's `seeds` set it")
    found = []
    for point in _grid(item, where):
        values = {part: dict(content) for part, content in parts.items()}
        for key, value in point.items():
            part, dot, rest = key.partition(".")
            if part not in values or not dot:
                raise ValueError(f"{where}.grid.{key}: must begin with set. or model.")
            values[part][rest] = value
        name = _point_name(base.name, point)
        found.append(replace(base, name=name, set=values["set"], model=values["model"]))
    return found


def _maps(item: Any, where: str) -> list[MapVariant]:
    """One entry of `maps`, or several by its grid."""
    as_mapping(item, where)
    known = {f.name for f in fields(MapVariant)}
    reject_unknown(item, known | {"grid"}, f"{where}.")
    found = []
    for point in _grid(item, where):
        reject_unknown(point, known - {"name", "note"}, f"{where}.grid.")
        content = {k: v for k, v in item.items() if k != "grid"} | point
        name = _point_name(as_name(item.get("name"), f"{where}.name"), point)
        found.append(_map({**content, "name": name}, where))
    return found


def _map(content: Mapping[str, Any], where: str) -> MapVariant:
    kind = content.get("kind", "gain")
    if kind not in KINDS:
        raise ValueError(f"{where}.kind: {kind!r} is not one of {', '.join(KINDS)}")
    budget = content.get("budget", "")
    placed = [name for name in ("budget", "shares", "cuts") if content.get(name)]
    if len(placed) != 1:
        raise ValueError(f"{where}: give one of budget, shares, cuts; got {placed or 'none'}")
    if budget:
        try:
            unit = Budget.parse(str(budget)).unit
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
        if unit != "activated_params":
            raise ValueError(
                f"{where}.budget: {budget!r} is in {unit}; tables of a study only count "
                "activated parameters"
            )
    elif kind != "threshold":
        raise ValueError(f"{where}.{placed[0]}: needs kind: threshold")
    lists: dict[str, tuple[Any, ...]] = {}
    for name in ("tiers", "shares", "cuts"):
        value = content.get(name, [])
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}.{name}: {value!r} is not a list")
        lists[name] = tuple(value)
    for name in ("shares", "cuts"):
        for value in lists[name]:
            check_number(value, f"{where}.{name}", 0.0, 1.0)
    if lists["shares"] and abs(sum(lists["shares"]) - 1.0) > 1e-6:
        raise ValueError(f"{where}.shares: {list(lists['shares'])} must add up to 1")
    if list(lists["cuts"]) != sorted(lists["cuts"]):
        raise ValueError(f"{where}.cuts: {list(lists['cuts'])} must rise")
    if len(set(lists["tiers"])) != len(lists["tiers"]) or len(lists["tiers"]) == 1:
        raise ValueError(f"{where}.tiers: {list(lists['tiers'])} must be two or more tier names")
    upper_cut = content.get("upper_cut", False)
    if not isinstance(upper_cut, bool) or (upper_cut and (kind != "threshold" or not budget)):
        raise ValueError(f"{where}.upper_cut: needs true or false, kind: threshold and a budget")
    for name in ("alpha", "delta"):
        if content.get(name) is not None:
            check_number(content[name], f"{where}.{name}", 0.0, 1.0, is_open=True)
    if content.get("alpha") is not None and not budget:
        raise ValueError(f"{where}.alpha: needs a budget")
    escalation = content.get("escalation")
    if escalation is not None:
        as_mapping(escalation, f"{where}.escalation")
        reject_unknown(escalation, set(_ESCALATION), f"{where}.escalation.")
        try:
            EscalationParams(**escalation)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}.escalation.{error}") from None
        if lists["tiers"]:
            raise ValueError(f"{where}.escalation: needs a map of all tiers")
    return MapVariant(
        name=content["name"],
        kind=kind,
        budget=str(budget),
        alpha=content.get("alpha"),
        delta=float(content.get("delta", 0.1)),
        upper_cut=upper_cut,
        tiers=tuple(str(name) for name in lists["tiers"]),
        shares=tuple(float(value) for value in lists["shares"]),
        cuts=tuple(float(value) for value in lists["cuts"]),
        items=as_whole(content.get("items", 0), f"{where}.items", 0),
        escalation=escalation,
        note=as_note(content, where),
    )


def _grid(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The points of a variant's grid; one empty point without."""
    grid = item.get("grid")
    if grid is None:
        return [{}]
    as_mapping(grid, f"{where}.grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}.grid.{key}: {values!r} is not a list of values")
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


def _point_name(name: str, point: Mapping[str, Any]) -> str:
    """The variant's, and what the grid sets."""
    shown = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in point.items()]
    return " ".join([name, *shown])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}={part}" for key, part in value.items())
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}: must be a list of variants, got {value!r}")
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
        raise ValueError(f"seeds: {value!r} is not a list of distinct whole numbers")
    return tuple(as_whole(seed, "seeds", 0) for seed in value)
