"""Fitting tier maps: how long it takes, whether the guard holds, what hopeless requests cost.

    python scripts/bench_tier_map.py [--outcomes RUN/outcomes ...] [--out FILE]

Outcomes are drawn from an ordinal model with known chances (easy, graded and hopeless requests), so
that failure rates are exact. With `--outcomes` (folders with fit.jsonl, calibrate.jsonl and
test.jsonl, as a training run leaves them) the hopeless part is also done on a trained model's.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dvpa.evaluate.report import describe_environment
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.calibrate import Budget, Split, clopper_pearson_upper, fit_tier_map
from dvpa.tiers.cuts import _completion, _Problem, solve_cuts
from dvpa.tiers.guard import fit_guard
from dvpa.tiers.solver import Solver
from dvpa.tiers.tier_map import TierMap

NAMES, COSTS = ("base", "small", "medium", "top"), (0.30, 0.53, 0.77, 1.0)  # nano's ratios
ABILITY = np.array([0.35, 0.5, 0.6, 0.7])
HOPELESS_SHARE, HOPELESS_SUCCESS = 0.2, 0.02
SIZES = (1_000, 10_000, 100_000, 1_000_000)
ALPHA, DELTA, RESAMPLES = 0.05, 0.1, 200
PARTS = ("fit", "calibrate", "test")  # tables of a training run
FLOORS = (0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)  # of the top tier's quality
KINDS = {"gain": ("gain", False), "threshold": ("threshold", False),
         "threshold, upper cut": ("threshold", True)}  # fmt: skip


def draw(seed: int, size: int) -> tuple[Split, np.ndarray, np.ndarray]:
    """Outcomes, the chances behind them [N, T], and who is hopeless [N]."""
    rng = np.random.default_rng(seed)
    is_hopeless = rng.random(size) < HOPELESS_SHARE
    d = np.where(is_hopeless, rng.beta(12, 1.5, size), rng.beta(1, 1.6, size))
    graded = 1.0 / (1.0 + np.exp(-14.0 * (ABILITY - d[:, None])))
    chance = np.where(is_hopeless[:, None], HOPELESS_SUCCESS, graded)
    return Split(d, (rng.random((size, 1)) < chance).astype(float)), chance, is_hopeless


def time_solver(rounds: int) -> list[dict[str, Any]]:
    """Seconds to solve, and to fit as a whole, by number of requests and kind."""
    rows = []
    for size in SIZES:
        fit, calibrate = draw(1, size)[0], draw(2, size)[0]
        template = replace(
            TierMap.untrained(NAMES, COSTS),
            calibration=fit_tier_map(
                fit, calibrate, COSTS, Budget(fraction=1.0), NAMES
            ).calibration,
        )
        for label, (kind, upper_cut) in KINDS.items():
            solve, whole, cpu = [], [], []
            for _ in range(rounds):
                solver = Solver(template, calibrate.traffic, kind, upper_cut)
                began, began_cpu = time.perf_counter(), time.process_time()
                solver.solve(0.6)
                solve.append(time.perf_counter() - began)
                cpu.append(time.process_time() - began_cpu)
                began = time.perf_counter()
                fit_tier_map(
                    fit, calibrate, COSTS, Budget(fraction=0.6), NAMES, kind, upper_cut=upper_cut
                )
                whole.append(time.perf_counter() - began)
            row = {"requests": size, "kind": label, "solve_s": float(np.median(solve))}
            row |= {"solve_cpu_s": float(np.median(cpu)), "fit_s": float(np.median(whole))}
            rows.append({**row, **exactness(template, calibrate, upper_cut, kind)})
            print(rows[-1], flush=True)
    return rows


def exactness(template: TierMap, split: Split, upper_cut: bool, kind: str) -> dict[str, Any]:
    """Whether the cuts are proved optimal, the proved gap, and the seconds one price takes."""
    if kind != "threshold":
        return {}
    d = np.sort(split.difficulty)
    order = [*range(len(COSTS)), *([0] if upper_cut else [])]
    value = template.success(d).T[order]
    cost = np.asarray(COSTS)[order, None] + np.zeros(len(d))
    found = solve_cuts(value, cost, 0.6 * len(d))
    zero = np.zeros((len(order), 1))
    problem = _Problem(*(np.concatenate([zero, a.cumsum(axis=1)], axis=1) for a in (value, cost)))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        _completion(problem, 1.0, -0.1)
        seconds.append(time.perf_counter() - began)
    gap = (found.bound - found.value) / found.bound
    return {"is_exact": found.is_exact, "gap": gap, "price_s": float(np.median(seconds))}


def check_guard() -> list[dict[str, Any]]:
    """Of RESAMPLES calibration sets, the share whose requests kept low lose more than ALPHA.

    `decisions` is the guard; `regions` bounds each tier's region by itself, at DELTA / tiers, and
    lets every request take the cheapest tier whose region it is in.
    """
    rows = []
    population, chance, _ = draw(99, 20_000)
    losing = chance[:, -1:] - chance  # of nested draws: P(top right, tier wrong)
    base = fit_tier_map(draw(1, 1500)[0], draw(2, 500)[0], COSTS, Budget(fraction=1.0), NAMES)
    template = replace(base, statistics=None, budget=None)
    for size in (500, 2000):
        exceeded: dict[str, list[bool]] = {}
        needed: dict[str, list[float]] = {}
        for seed in range(RESAMPLES):
            calibrate = draw(1000 + seed, size)[0]
            guards = {"decisions": fit_guard(template, calibrate, ALPHA, DELTA)}
            guards["regions"] = regions_guard(template, calibrate)
            for name, guard in guards.items():
                solver = Solver(replace(template, guard=guard), calibrate.traffic, "gain")
                tiers = solver.solve(solver.least).tiers(population.difficulty)
                low = tiers < len(COSTS) - 1
                rate = losing[np.arange(len(tiers)), tiers][low].mean() if low.any() else 0.0
                exceeded.setdefault(name, []).append(bool(rate > ALPHA))
                needed.setdefault(name, []).append(solver.least / solver.most)
        for name, found in exceeded.items():
            row = {"requests": size, "bounds": name, "exceeded": float(np.mean(found))}
            rows.append(row | {"least_cost": float(np.mean(needed[name]))})
            print(rows[-1], flush=True)
    return rows


def regions_guard(template: TierMap, calibrate: Split) -> dict[str, Any]:
    """Per tier the largest loss P_top - P_t up to which the region's own bound is at most ALPHA."""
    success = template.success(calibrate.difficulty)
    loss = success[:, -1:] - success[:, :-1]
    failed = calibrate.quality[:, -1:] - calibrate.quality[:, :-1] > 0.1
    cuts = []
    for tier in range(loss.shape[1]):
        best = -1.0
        for cut in np.geomspace(0.01, 1.0, 28):
            inside = loss[:, tier] <= cut
            failures, kept = int(failed[inside, tier].sum()), int(inside.sum())
            if kept < 150:
                continue
            if clopper_pearson_upper(failures, kept, DELTA / loss.shape[1]) > ALPHA:
                break
            best = float(cut)
        cuts.append(best)
    return {"alpha": ALPHA, "delta": DELTA, "cuts": cuts}


def compare_on_hopeless(
    fit: Split, calibrate: Split, test: Split, costs: Sequence[float], is_hopeless: np.ndarray
) -> list[dict[str, Any]]:
    """What each kind of map spends, in all and on hopeless requests, at equal quality floors.

    Quality is that of `test`; costs are shares of the top tier's.
    """
    names = [f"t{tier}" for tier in range(len(costs))]
    relative = np.asarray(costs) / costs[-1]
    rows = []
    for label, (kind, upper_cut) in KINDS.items():
        for floor in FLOORS:
            try:
                tier_map = fit_tier_map(
                    fit, calibrate, costs, Budget(min_quality=floor), names, kind,
                    upper_cut=upper_cut,
                )  # fmt: skip
            except ValueError:  # a gain map that cannot reach the floor
                continue
            tiers = tier_map.tiers(test.difficulty)
            kept = test.quality[np.arange(len(tiers)), tiers].mean() / test.quality[:, -1].mean()
            hopeless = tiers[is_hopeless]
            rows.append(
                {
                    "kind": label,
                    "floor": floor,
                    "quality_kept": float(kept),
                    "cost": float(relative[tiers].mean()),
                    "cost_on_hopeless": float(relative[hopeless].mean()),
                    "hopeless_at_top": float((hopeless == len(costs) - 1).mean()),
                }
            )
    return rows


def on_outcomes(folder: Path) -> dict[str, Any]:
    """The same on a run's outcome tables; hopeless are the requests that no tier got right."""
    tables = {part: OutcomeTable.load(folder / f"{part}.jsonl") for part in PARTS}
    fit, calibrate, test = (Split(t.difficulty, t.quality) for t in tables.values())
    is_hopeless = test.quality.max(axis=1) == 0
    config = json.loads((folder.parent / "checkpoint" / "tier_map.json").read_text())
    rows = compare_on_hopeless(fit, calibrate, test, config["costs"], is_hopeless)
    return {"requests": len(test), "hopeless": float(is_hopeless.mean()), "rows": rows}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--outcomes", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/tier_map.json"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # small splits are meant
    fit, calibrate = draw(1, 4000)[0], draw(2, 4000)[0]
    test, _, is_hopeless = draw(3, 20_000)
    result = {
        "command": "python scripts/bench_tier_map.py",
        "rounds": arguments.rounds,
        "solver": time_solver(arguments.rounds),
        "guard": {"alpha": ALPHA, "delta": DELTA, "resamples": RESAMPLES, "rows": check_guard()},
        "hopeless": {
            "share": HOPELESS_SHARE,
            "rows": compare_on_hopeless(fit, calibrate, test, COSTS, is_hopeless),
        },
        "trained": [on_outcomes(folder) for folder in arguments.outcomes],
        "environment": describe_environment(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
