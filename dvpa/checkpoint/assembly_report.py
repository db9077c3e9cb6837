"""What an assembly did, counted: coverage by class and rule, and how far the parents differ."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dvpa.checkpoint.assembly_plan import Plan, Step
from dvpa.checkpoint.assembly_steps import ACTIONS, MERGED, Outcome
from dvpa.checkpoint.tensor_class import CLASSES

BINS = 48


@dataclass(frozen=True)
class Coverage:
    """Tensors (scales included) and bytes of a class or a rule, by what was done with them.

    `parents` counts the tensors copied from each parent. `difference` has min, median, mean, p95
    and max of the differences from the base (root mean squares) and `relative` the median of them
    over the base's own root mean square; both None where nothing was compared.
    """

    name: str
    tensors: int
    num_bytes: int
    actions: dict[str, int]
    parents: dict[str, int]
    compared: int
    difference: dict[str, float] | None
    relative: float | None


@dataclass(frozen=True)
class AssemblyReport:
    """Everything that is in `assembly.json`.

    `histogram`: `edges` are of log10(difference); `classes` has counts per bin and action. Equal
    tensors (difference 0) and those that were not compared are not in it. `bytes_read` is of this
    run alone, `resumed_shards` were finished by earlier ones.
    """

    recipe: dict[str, Any]
    tensors: int
    num_bytes: int
    classes: list[Coverage]
    rules: list[Coverage]
    histogram: dict[str, Any]
    config_differences: dict[str, Any]
    warnings: list[str]
    wall_seconds: float
    bytes_read: int
    resumed_shards: int
    environment: dict[str, str]

    @property
    def actions(self) -> dict[str, int]:
        """Tensors by what was done with them."""
        return {key: sum(row.actions.get(key, 0) for row in self.classes) for key in ACTIONS}

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {**asdict(self), "actions": self.actions}


def build_report(
    plan: Plan,
    outcomes: Sequence[Outcome | None],
    wall_seconds: float,
    bytes_read: int,
    resumed_shards: int,
) -> AssemblyReport:
    """Count.

    Raises:
        ValueError: a tensor without an outcome, or one that is in no step.
    """
    done: list[tuple[Step, Outcome]] = []
    for step, outcome in zip(plan.steps, outcomes, strict=True):
        if outcome is None:
            raise ValueError(f"{step.name}: unaccounted for")
        done.append((step, outcome))
    covered = {name for step in plan.steps for name in (step.name, step.scale)}
    for name in plan.base.tensors:
        if name not in covered:
            raise ValueError(f"{name}: unaccounted for")
    names = list(plan.recipe.parents)
    classes, rules = [], []
    for kind in CLASSES:
        if rows := [pair for pair in done if pair[0].place.tensor_class == kind]:
            classes.append(_coverage(kind, rows, names))
    for i, rule in enumerate(plan.recipe.rules):
        rows = [pair for pair in done if pair[0].rule == i]
        rules.append(_coverage(rule.describe(), rows, names))
    return AssemblyReport(
        recipe={"name": plan.recipe.name, **plan.recipe.to_dict()},
        tensors=len(plan.base.tensors),
        num_bytes=plan.num_bytes,
        classes=classes,
        rules=rules,
        histogram=_histogram(done),
        config_differences={key: dict(values) for key, values in plan.config_differences.items()},
        warnings=list(plan.warnings),
        wall_seconds=wall_seconds,
        bytes_read=bytes_read,
        resumed_shards=resumed_shards,
        environment=_environment(),
    )


def tensor_rows(plan: Plan, outcomes: Sequence[Outcome | None]) -> Iterator[list[str]]:
    """A header, then a row per tensor: name, class, rule, action, parent, difference, relative."""
    names = list(plan.recipe.parents)
    yield ["tensor", "class", "rule", "action", "parent", "difference", "relative"]
    for step, outcome in zip(plan.steps, outcomes, strict=True):
        assert outcome is not None
        parent = "" if outcome.parent is None else names[outcome.parent]
        numbers = ["" if x is None else f"{x:.6g}" for x in (outcome.difference, outcome.relative)]
        kind = step.place.tensor_class
        for name in filter(None, (step.name, step.scale)):
            yield [name, kind, str(step.rule), outcome.action, parent, *numbers]


def _coverage(name: str, rows: Sequence[tuple[Step, Outcome]], parents: list[str]) -> Coverage:
    actions, copied = dict.fromkeys(ACTIONS, 0), dict.fromkeys(parents, 0)
    tensors = num_bytes = 0
    for step, outcome in rows:
        count = 1 if step.scale is None else 2
        tensors += count
        num_bytes += step.num_bytes
        actions[outcome.action] += count
        if outcome.action != MERGED and outcome.parent is not None:
            copied[parents[outcome.parent]] += count
    found = [(o.difference, o.relative) for _, o in rows if o.difference is not None]
    relatives = [relative for _, relative in found if relative is not None]
    return Coverage(
        name=name,
        tensors=tensors,
        num_bytes=num_bytes,
        actions=actions,
        parents=copied,
        compared=len(found),
        difference=_spread(np.array([difference for difference, _ in found])),
        relative=float(np.median(relatives)) if relatives else None,
    )


def _spread(values: Any) -> dict[str, float] | None:
    if not len(values):
        return None
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.quantile(values, 0.95)),
        "max": float(values.max()),
    }


def _histogram(done: Sequence[tuple[Step, Outcome]]) -> dict[str, Any]:
    """Counts over log10(difference), per class and action."""
    logs: dict[str, dict[str, list[float]]] = {}
    for step, outcome in done:
        if outcome.difference:
            by_action = logs.setdefault(step.place.tensor_class, {})
            by_action.setdefault(outcome.action, []).append(float(np.log10(outcome.difference)))
    values = [value for by_action in logs.values() for each in by_action.values() for value in each]
    if not values:
        return {"edges": [], "classes": {}}
    low, high = min(values), max(values)
    margin = max(0.05, 0.02 * (high - low))
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    classes: Mapping[str, Any] = {
        kind: {action: np.histogram(each, edges)[0].tolist() for action, each in logs[kind].items()}
        for kind in CLASSES
        if kind in logs
    }
    return {"edges": edges.tolist(), "classes": dict(classes)}


def _environment() -> dict[str, str]:
    from dvpa import __version__

    return {
        "dvpa": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
