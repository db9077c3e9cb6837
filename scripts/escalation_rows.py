"""The escalation benchmark's arithmetic: outcomes, the coin at equal cost, intervals, AUROCs.

Letters: N requests, T tiers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from escalation_replay import NEVER, Course, Replay, Run, Start
from scipy.stats import t as student_t

from dvpa.engine import EscalationParams
from dvpa.evaluate.baselines import Scores, route_by_score
from dvpa.evaluate.metrics import auroc, bootstrap_ci
from dvpa.evaluate.table import OutcomeTable
from dvpa.tasks import TaskSet
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]
Row = dict[str, Any]
Rule = Callable[[EscalationParams], list[Course]]

UPPER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LOWER = (0.0, 0.5, 1.0)  # of upper; 0: once at most
SMOOTHING = (0.0, 0.5, 0.8)
MIN_SHARE = 0.03  # of requests that go up, or bounds say nothing
NUM_DRAWS = 8


@dataclass(frozen=True)
class Outcome:
    """Each request's quality, FLOPs and whether it went up, all float [N]; means over draws too."""

    quality: FloatArray
    flops: FloatArray
    goes_up: FloatArray


def outcome_of(runs: Sequence[Run]) -> Outcome:
    """Columns of runs."""
    return Outcome(
        np.array([run.quality for run in runs]),
        np.array([run.flops for run in runs]),
        np.array([float(run.tier > run.first_tier) for run in runs]),
    )


def coin_quality(alternatives: Sequence[Outcome], flops: float) -> FloatArray:
    """Expected quality [N] of a coin that spends `flops` on the mean, first alternative the start.

    It lies on the upper hull of the alternatives from the start on: the best two to mix. Beyond
    the last corner of the hull, that corner.
    """
    here, others = alternatives[0], alternatives[1:]
    while True:
        dearer = [o for o in others if o.flops.mean() > here.flops.mean()]
        if not dearer:
            return here.quality
        slopes = [
            (o.quality.mean() - here.quality.mean()) / (o.flops.mean() - here.flops.mean())
            for o in dearer
        ]
        ahead = dearer[int(np.argmax(slopes))]
        if max(slopes) <= 0:
            return here.quality
        if ahead.flops.mean() >= flops:
            share = (flops - here.flops.mean()) / (ahead.flops.mean() - here.flops.mean())
            share = float(np.clip(share, 0, 1))
            return (1 - share) * here.quality + share * ahead.quality
        here = ahead


def above_coin(outcome: Outcome, alternatives: Sequence[Outcome]) -> FloatArray:
    """Quality [N] minus the coin's at the same mean FLOPs."""
    return outcome.quality - coin_quality(alternatives, float(outcome.flops.mean()))


def grid() -> list[EscalationParams]:
    """All bounds tried."""
    return [
        EscalationParams(upper=upper, lower=round(share * upper, 3), smoothing=smoothing)
        for upper, share, smoothing in product(UPPER, LOWER, SMOOTHING)
    ]


class Split:
    """The tasks of one split, a replay for each start, and each tier's outcome for all."""

    def __init__(self, folder: Path, tasks: TaskSet, max_tokens: int, num_tiers: int) -> None:
        starts = [Start(), *(Start(tier) for tier in range(num_tiers))]
        self.replays = {start: Replay(folder, start, tasks, max_tokens) for start in starts}
        self.num_tiers = num_tiers

    @cached_property
    def static(self) -> list[Outcome]:
        """Every tier's outcome."""
        return [outcome_of(self.replays[Start(t)].never()) for t in range(self.num_tiers)]

    def alternatives(self, start: Start) -> list[Outcome]:
        """What a coin may choose from: the start as it is, then the static tiers."""
        return [outcome_of(self.replays[start].never()), *self.static]


def choose(split: Split, start: Start, rule: Rule) -> EscalationParams:
    """The bounds farthest above the coin, of those under which enough requests go up."""
    found: list[tuple[float, EscalationParams]] = []
    for params in grid():
        courses = rule(params)
        if np.mean([course != NEVER for course in courses]) >= MIN_SHARE:
            outcome = outcome_of(split.replays[start].runs(courses))
            margin = float(above_coin(outcome, split.alternatives(start)).mean())
            found.append((margin, params))
    if not found:
        raise ValueError(f"calibrate: no bounds send {MIN_SHARE:.0%} of the requests up")
    return max(found, key=lambda pair: pair[0])[1]


def within(split: Split, start: Start, rule: Rule, flops: float) -> EscalationParams:
    """The bounds of the best quality, of those that spend at most `flops` on the mean."""
    found: list[tuple[float, EscalationParams]] = []
    for params in grid():
        outcome = outcome_of(split.replays[start].runs(rule(params)))
        if outcome.flops.mean() <= flops:
            found.append((float(outcome.quality.mean()), params))
    if not found:
        raise ValueError(f"calibrate: no bounds spend at most {flops:.0f} FLOPs a request")
    return max(found, key=lambda pair: pair[0])[1]


def redone(runs: Sequence[Run], whole: Sequence[Sequence[Run]]) -> Outcome:
    """Requests that went up are answered anew by their last tier, which reads the prompt too."""
    quality, flops, goes_up = [], [], []
    for number, run in enumerate(runs):
        is_redone = run.tier > run.first_tier
        new = whole[run.tier][number]
        quality.append(new.quality if is_redone else run.quality)
        flops.append(run.flops_before + new.flops if is_redone else run.flops)
        goes_up.append(float(is_redone))
    return Outcome(np.array(quality), np.array(flops), np.array(goes_up))


def dealt(replay: Replay, courses: Sequence[Course], seed: int) -> Outcome:
    """Mean of `NUM_DRAWS` random deals of the courses among requests of the same first tier."""
    runs, draws = replay.never(), []
    rng = np.random.default_rng(seed)
    first = np.array([run.first_tier for run in runs])
    for _ in range(NUM_DRAWS):
        order = np.arange(len(runs))
        for tier in np.unique(first):
            order[first == tier] = rng.permutation(order[first == tier])
        deal = [shortened(courses[i], run.num_tokens) for i, run in zip(order, runs, strict=True)]
        draws.append(outcome_of(replay.runs(deal)))
    return Outcome(
        np.mean([draw.quality for draw in draws], axis=0),
        np.mean([draw.flops for draw in draws], axis=0),
        np.mean([draw.goes_up for draw in draws], axis=0),
    )


def shortened(course: Course, num_tokens: int) -> Course:
    """The course for an answer of so many tokens: none later than its last, none twice."""
    return tuple(dict.fromkeys(min(token, num_tokens - 1) for token in course))


def difference(per_seed: Sequence[FloatArray]) -> Row:
    """Mean of paired differences, each seed's [N]: 95 % over requests (bootstrap, seeds fixed and
    pooled), over seeds (t), and the seeds' own means and bootstrap intervals."""
    means = [float(values.mean()) for values in per_seed]
    mean, count = float(np.mean(means)), len(means)
    row: Row = {
        "mean": mean,
        "ci95_requests": list(bootstrap_ci(np.concatenate(per_seed))),
        "per_seed": means,
        "ci95_per_seed": [list(bootstrap_ci(values)) for values in per_seed],
    }
    if count > 1:
        half = student_t.ppf(0.975, count - 1) * np.std(means, ddof=1) / math.sqrt(count)
        row["ci95_seeds"] = [mean - half, mean + half]
    return row


def summarise(seeds: Sequence[Row]) -> Row:
    """Means over seeds, with intervals where a difference is meant."""
    per_flop = float(np.mean([seed["activated_per_flop"] for seed in seeds]))

    def point(rows: Sequence[Row]) -> Row:
        flops = float(np.mean([row["flops"] for row in rows]))
        qualities = [float(row["quality"].mean()) for row in rows]
        return {
            "quality": float(np.mean(qualities)),
            "quality_per_seed": qualities,
            "flops": flops,
            "activated": flops * per_flop,
        }

    def full(start: str, name: str) -> Row:
        rows = [seed["starts"][start]["rows"][name] for seed in seeds]
        return {
            **point(rows),
            "goes_up": float(np.mean([row["goes_up"] for row in rows])),
            **{key: difference([r[key] for r in rows]) for key in ("above_coin", "escalate_minus")},
        }

    first = seeds[0]
    return {
        "seeds": [seed["seed"] for seed in seeds],
        "requests": len(first["static"][0]["quality"]),
        "tier_names": list(first["tier_names"]),
        **{
            kind: [point(rows) for rows in zip(*(seed[kind] for seed in seeds), strict=True)]
            for kind in ("static", "whole")
        },
        "starts": {
            start: {
                "rows": {name: full(start, name) for name in block["rows"]},
                "told_per_seed": [seed["starts"][start]["told"] for seed in seeds],
            }
            for start, block in first["starts"].items()
        },
        "instead_of_map": {
            name: {
                **point([seed["instead_of_map"][name] for seed in seeds]),
                "minus_map": difference(
                    [
                        seed["instead_of_map"][name]["quality"]
                        - seed["instead_of_map"]["map"]["quality"]
                        for seed in seeds
                    ]
                ),
                "chosen_per_seed": [seed["instead_of_map"][name]["chosen"] for seed in seeds],
            }
            for name in first["instead_of_map"]
        },
        "doubt_per_seed": [seed["doubt"] for seed in seeds],
        "readings": {
            name: {
                **point([seed["readings"][name] for seed in seeds]),
                **{
                    key: float(np.mean([seed["readings"][name][key] for seed in seeds]))
                    for key in ("wall_s", "cpu_s")
                },
                "minus_base": difference(
                    [
                        seed["readings"][name]["quality"]
                        - seed["readings"][name.replace("tier,", "base,")]["quality"]
                        for seed in seeds
                    ]
                ),
            }
            for name in first["readings"]
        },
    }


def map_at_cost(
    folder: Path,
    tier_map: TierMap,
    difficulty: FloatArray,
    static: Sequence[Outcome],
    activated_per_flop: float,
    flops: float,
) -> Outcome:
    """The tier map, fitted anew on the run's own fit and calibrate splits to spend `flops` here.

    static: every tier's outcome, the price of choosing it included; a coin between the two nearest
    maps spends the remainder.
    """
    tables = [OutcomeTable.load_jsonl(folder / "outcomes" / f"{part}.jsonl")
              for part in ("fit", "calibrate")]  # fmt: skip
    fit, calibrate = tables
    prices = np.stack([outcome.flops for outcome in static], axis=1)
    tiers = route_by_score(
        Scores(fit.difficulty, calibrate.difficulty, difficulty),
        fit,
        calibrate,
        tier_map.costs,
        tier_map.tier_names,
        flops * activated_per_flop,
        tier_map.kind,
        charged=prices * activated_per_flop,
    )
    rows = np.arange(len(tiers))
    quality = np.stack([outcome.quality for outcome in static], axis=1)
    return Outcome(quality[rows, tiers], prices[rows, tiers], np.zeros(len(tiers)))


def doubt_table(
    base: Sequence[Run], difficulty: FloatArray, top: Outcome, kept: npt.NDArray[np.bool_]
) -> Row:
    """AUROC of what is known at the base tier for what escalation is to find.

    `kept` [N]: the requests the map leaves at the base tier, where only escalation can help.
    """
    quality = np.array([run.quality for run in base])
    statistics = {
        "first": np.array([run.doubts[0] for run in base]),
        "mean": np.array([float(np.mean(run.doubts)) for run in base]),
        "difficulty": difficulty,
    }
    wrong = quality < 0.5
    repaired = wrong & (top.quality >= 0.5)
    labels = {"base wrong": wrong, "base wrong, top right": repaired}
    return {
        scope: {
            "requests": int(inside.sum()),
            **{
                label: {
                    "share": float(found[inside].mean()),
                    **{name: auroc(v[inside], found[inside]) for name, v in statistics.items()},
                }
                for label, found in labels.items()
            },
        }
        for scope, inside in (("all", np.ones(len(base), dtype=bool)), ("kept at base", kept))
    }
