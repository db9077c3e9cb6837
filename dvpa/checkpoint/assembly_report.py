"""What an assembly did, counted: coverage by class and rule, and how far the parents differ."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvpa.checkpoint.assembly_plan import Plan
from dvpa.checkpoint.step_table import ACTIONS, MERGED, Outcomes
from dvpa.checkpoint.tensor_class import CLASSES

BINS = 48
Table = NDArray[np.void]


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
    outcomes: Outcomes,
    wall_seconds: float,
    bytes_read: int,
    resumed_shards: int,
) -> AssemblyReport:
    """Count.

    Raises:
        ValueError: a tensor without an outcome, or one that is in no step.
    """
    missing = np.flatnonzero(outcomes.table["action"] < 0)
    if len(missing):
        step = next(step for step in plan.steps if step.number == missing[0])
        raise ValueError(f"{step.name}: unaccounted for")
    counted, held = len(plan.steps) + plan.steps.num_scales, len(plan.base)
    if counted != held:
        raise ValueError(f"{plan.base.folder}: {held - counted} of {held} tensors unaccounted for")
    steps, names = plan.steps.columns(), list(plan.recipe.parents)
    classes = [
        _coverage(kind, steps[rows], outcomes.table[rows], names)
        for i, kind in enumerate(CLASSES)
        if (rows := steps["class"] == i).any()
    ]
    rules = []
    for i, rule in enumerate(plan.recipe.rules):
        rows = steps["rule"] == i
        rules.append(_coverage(rule.describe(), steps[rows], outcomes.table[rows], names))
    return AssemblyReport(
        recipe={"name": plan.recipe.name, **plan.recipe.to_dict()},
        tensors=held,
        num_bytes=plan.steps.num_bytes,
        classes=classes,
        rules=rules,
        histogram=_histogram(steps, outcomes.table),
        config_differences={key: dict(values) for key, values in plan.config_differences.items()},
        warnings=list(plan.warnings),
        wall_seconds=wall_seconds,
        bytes_read=bytes_read,
        resumed_shards=resumed_shards,
        environment=_environment(),
    )


def tensor_rows(plan: Plan, outcomes: Outcomes) -> Iterator[list[str]]:
    """A header, then a row per tensor: name, class, rule, action, parent, difference, relative."""
    names = list(plan.recipe.parents)
    yield ["tensor", "class", "rule", "action", "parent", "difference", "relative"]
    for step in plan.steps:
        outcome = outcomes[step.number]
        assert outcome is not None
        parent = "" if outcome.parent is None else names[outcome.parent]
        numbers = ["" if x is None else f"{x:.6g}" for x in (outcome.difference, outcome.relative)]
        kind = step.tensor_class
        for name in filter(None, (step.name, step.scale)):
            yield [name, kind, str(step.rule), outcome.action, parent, *numbers]


def _coverage(name: str, steps: Table, outcomes: Table, parents: list[str]) -> Coverage:
    """Of the steps of a class or a rule."""
    counts, merged = steps["tensors"], list(ACTIONS).index(MERGED)
    is_copy = outcomes["action"] != merged
    compared = ~np.isnan(outcomes["difference"])
    relatives = outcomes["relative"][compared & ~np.isnan(outcomes["relative"])]
    return Coverage(
        name=name,
        tensors=int(counts.sum()),
        num_bytes=int(steps["num_bytes"].sum()),
        actions={
            action: int(counts[outcomes["action"] == i].sum()) for i, action in enumerate(ACTIONS)
        },
        parents={
            parent: int(counts[is_copy & (outcomes["parent"] == i)].sum())
            for i, parent in enumerate(parents)
        },
        compared=int(compared.sum()),
        difference=_spread(outcomes["difference"][compared]),
        relative=float(np.median(relatives)) if len(relatives) else None,
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


def _histogram(steps: Table, outcomes: Table) -> dict[str, Any]:
    """Counts over log10(difference), per class and action."""
    shown = outcomes["difference"] > 0  # neither equal nor NaN: not compared
    if not shown.any():
        return {"edges": [], "classes": {}}
    logs = np.log10(outcomes["difference"][shown])
    kinds, actions = steps["class"][shown], outcomes["action"][shown]
    low, high = float(logs.min()), float(logs.max())
    margin = max(0.05, 0.02 * (high - low))
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    classes: dict[str, dict[str, list[int]]] = {}
    for i, kind in enumerate(CLASSES):
        for j, action in enumerate(ACTIONS):
            found = logs[(kinds == i) & (actions == j)]
            if len(found):
                counts = np.histogram(found, edges)[0].tolist()
                classes.setdefault(kind, {})[action] = counts
    return {"edges": edges.tolist(), "classes": classes}


def _environment() -> dict[str, str]:
    from dvpa import __version__

    return {
        "dvpa": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
