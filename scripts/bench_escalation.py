"""Escalation while decoding on trained nano: quality at counted cost, beside what else it buys.

    python scripts/bench_escalation.py RUN [RUN ...] [--calibrate 1500] [--test 2000]

RUN: a seed's folder below that of `dvpa demo --seeds 3 --seed 5`. Fresh tasks, greedy; bounds of
the doubt are chosen on the calibrate split, everything reported is of the test split.
FLOPs are those of the engine's telemetry; activated parameters are FLOPs / 2 over the positions of
prompt and reference answer.

Rows, for each start (the fitted map, always base, always small; the base tier reads the prompts):
    never     the tier stays
    escalate  the engine's rule, cache kept, bounds chosen; `default`: the engine's default bounds
    redo      the same requests, answered again from the prompt on by their last tier; both paid
    random    courses of `escalate` dealt out at random among requests of the same first tier
    jump      up to the top tier at once (the engine does not do this), bounds chosen for it
    map       the tier map fitted anew to spend what `escalate` spends: a better start instead
`above coin`: quality minus that of a coin, thrown before the start, between the start as it is and
the static tiers (upper hull), at equal mean FLOPs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from escalation_page import FIGURE, escalation_png
from escalation_replay import Replay, Run, Start, open_engine, params_of
from escalation_rows import (
    UPPER,
    Outcome,
    Split,
    above_coin,
    choose,
    coin_quality,
    dealt,
    doubt_table,
    map_at_cost,
    outcome_of,
    redone,
    summarise,
    within,
)
from transformers import AutoTokenizer

from dvpa.engine import EscalationParams
from dvpa.evaluate.report import describe_environment
from dvpa.tasks import GradedTasks, verify
from dvpa.tasks.encoding import encode_tasks
from dvpa.tiers.tier_map import TierMap

EXTRA_TOKENS = 2  # that a wrong answer may take beyond the longest right one
WALL_BATCH = 32
FRESH = 100  # added to the run's seed: other tasks than its own
STARTS = {"map": Start(), "base": Start(0), "small": Start(1)}
Row = dict[str, Any]


class Seed:
    """One trained run: everything measured on it."""

    def __init__(self, folder: Path, num_calibrate: int, num_test: int) -> None:
        self.folder, self.checkpoint = folder, folder / "checkpoint"
        recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
        self.number = int(recipe["seed"])
        data = recipe["data"]["graded"]
        source = GradedTasks(
            data["seed"],
            num_facts=data["num_facts"],
            filler=data["filler"],
            recall_share=data["recall_share"],
            level_weights=data["evaluation_weights"],
        )
        self.tier_map = TierMap.load(self.checkpoint / "tier_map.json")
        calibrate = source.sample("calibrate", num_calibrate, seed=self.number + FRESH)
        self.tasks = source.sample("test", num_test, seed=self.number + FRESH)
        num_tiers = self.tier_map.num_tiers
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        pairs = [encode_tasks(tokenizer, list(part)) for part in (calibrate, self.tasks)]
        self.max_tokens = EXTRA_TOKENS + max(len(answer) for part in pairs for _, answer in part)
        positions = [len(prompt) - 1 + len(answer) for prompt, answer in pairs[1]]
        self.activated_per_flop = 1 / (2 * float(np.mean(positions)))
        self.calibrate = Split(self.checkpoint, calibrate, self.max_tokens, num_tiers)
        self.test = Split(self.checkpoint, self.tasks, self.max_tokens, num_tiers)
        routed = self.test.replays[Start()].never()
        self.difficulty = np.array([run.difficulty for run in routed], dtype=float)

    @cached_property
    def whole(self) -> list[list[Run]]:
        """Every tier's runs where it reads the prompts itself."""
        starts = [Start(tier, is_whole=True) for tier in range(self.test.num_tiers)]
        return [Replay(self.checkpoint, s, self.tasks, self.max_tokens).never() for s in starts]

    def rows(self, start: Start) -> tuple[dict[str, Outcome], Row]:
        """Every row's outcome, and what else is to be told of this start."""
        replay, fitting = self.test.replays[start], self.calibrate.replays[start]
        chosen = choose(self.calibrate, start, fitting.courses)
        leap = choose(self.calibrate, start, fitting.jumps)
        courses = replay.courses(chosen)
        runs = replay.runs(courses)
        self._confirm(start, chosen, runs)
        rows = {
            "never": outcome_of(replay.never()),
            "escalate": outcome_of(runs),
            "default": outcome_of(replay.runs(replay.courses(EscalationParams()))),
            "redo": redone(runs, self.whole),
            "random": dealt(replay, courses, self.number),
            "jump": outcome_of(replay.runs(replay.jumps(leap))),
        }
        rows["map"] = self._map(float(rows["escalate"].flops.mean()))
        before, after = rows["never"].quality, rows["escalate"].quality
        sweep = [EscalationParams(**{**asdict(chosen), "upper": u, "lower": min(u, chosen.lower)})
                 for u in UPPER]  # fmt: skip
        return rows, {
            "chosen": asdict(chosen),
            "chosen_jump": asdict(leap),
            "mended": float((after > before).mean()),
            "broken": float((after < before).mean()),
            "twice": float(np.mean([run.tier - run.first_tier > 1 for run in runs])),
            "tier_tokens": np.sum([run.tier_tokens for run in runs], axis=0).tolist(),
            "sweep": [self._point(outcome_of(replay.runs(replay.courses(p)))) for p in sweep],
            "sweep_jump": [self._point(outcome_of(replay.runs(replay.jumps(p)))) for p in sweep],
        }

    def instead_of_map(self) -> dict[str, Row]:
        """All start at base and doubt alone decides, for at most what the map spends."""
        base, fitting = self.test.replays[Start(0)], self.calibrate.replays[Start(0)]
        routed = outcome_of(self.test.replays[Start()].never())
        limit = float(outcome_of(self.calibrate.replays[Start()].never()).flops.mean())
        climb = within(self.calibrate, Start(0), fitting.courses, limit)
        leap = within(self.calibrate, Start(0), fitting.jumps, limit)
        found = {
            "map": (routed, None),
            "escalate": (outcome_of(base.runs(base.courses(climb))), asdict(climb)),
            "jump": (outcome_of(base.runs(base.jumps(leap))), asdict(leap)),
        }
        return {
            name: {"quality": o.quality, "flops": float(o.flops.mean()), "chosen": chosen}
            for name, (o, chosen) in found.items()
        }

    def _point(self, outcome: Outcome) -> list[float]:
        """(activated parameters, quality)."""
        return [
            float(outcome.flops.mean()) * self.activated_per_flop,
            float(outcome.quality.mean()),
        ]

    def _map(self, flops: float) -> Outcome:
        replays = [self.test.replays[Start(tier)] for tier in range(len(self.test.static))]
        static = [
            Outcome(outcome.quality, outcome.flops + replay.overhead(tier), outcome.goes_up)
            for tier, (outcome, replay) in enumerate(zip(self.test.static, replays, strict=True))
        ]
        return map_at_cost(
            self.folder, self.tier_map, self.difficulty, static, self.activated_per_flop, flops
        )

    def _confirm(self, start: Start, params: EscalationParams, runs: Sequence[Run]) -> None:
        """RuntimeError unless the engine by itself answers and charges as replayed."""
        answers, _, _ = self.answer(start, "base", params)
        overhead = self.test.replays[start].overhead
        expected = [(run.text, run.flops + overhead(run.first_tier)) for run in runs]
        wrong = [i for i, (a, b) in enumerate(zip(answers, expected, strict=True)) if a[:2] != b]
        if wrong:
            i = wrong[0]
            raise RuntimeError(f"{len(wrong)} differ; task {i}: {answers[i]} not {expected[i]}")

    def answer(
        self, start: Start, read_prompt: str, params: EscalationParams | None
    ) -> tuple[list[tuple[str, float, float]], float, float]:
        """The engine by itself: (text, FLOPs, quality) of each task, wall and CPU seconds."""
        engine = open_engine(self.checkpoint, start, params, read_prompt, WALL_BATCH)
        wall, cpu = time.perf_counter(), time.process_time()
        questions = [task.question for task in self.tasks]
        outputs = engine.generate(questions, params_of(start, self.max_tokens))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        engine.close()
        answers = [
            (output.text, output.telemetry.flops, verify(task, output.text))
            for task, output in zip(self.tasks, outputs, strict=True)
        ]
        return answers, wall, cpu

    def readings(self, params: EscalationParams, rounds: int) -> dict[str, Row]:
        """Who reads the prompt of a routed request: quality, FLOPs, median seconds."""
        found: dict[str, list[Any]] = {}
        for _ in range(rounds):
            for read, rule in product(("base", "tier"), (None, params)):
                name = f"{read}, {'never' if rule is None else 'escalate'}"
                found.setdefault(name, []).append(self.answer(Start(), read, rule))
        return {
            name: {
                "quality": np.array([quality for _, _, quality in runs[0][0]]),
                "flops": float(np.mean([flops for _, flops, _ in runs[0][0]])),
                "wall_s": statistics.median(wall for _, wall, _ in runs),
                "cpu_s": statistics.median(cpu for _, _, cpu in runs),
            }
            for name, runs in found.items()
        }


def measure(folder: Path, arguments: argparse.Namespace) -> Row:
    """Outcomes of one seed, arrays by request still."""
    seed = Seed(folder, arguments.calibrate, arguments.test)
    test = seed.test
    starts: dict[str, Row] = {}
    for name, start in STARTS.items():
        rows, told = seed.rows(start)
        alternatives = test.alternatives(start)
        starts[name] = {"told": told, "rows": {}}
        coin = coin_quality(alternatives, float(rows["escalate"].flops.mean()))
        for row, outcome in rows.items():
            starts[name]["rows"][row] = {
                "quality": outcome.quality,
                "flops": float(outcome.flops.mean()),
                "goes_up": float(outcome.goes_up.mean()),
                "above_coin": above_coin(outcome, alternatives),
                "escalate_minus": rows["escalate"].quality - outcome.quality,
            }
        starts[name]["rows"]["coin"] = {
            "quality": coin,
            "flops": float(rows["escalate"].flops.mean()),
            "goes_up": 0.0,
            "above_coin": np.zeros(len(coin)),
            "escalate_minus": rows["escalate"].quality - coin,
        }
        print(f"seed {seed.number}, start {name}: {told['chosen']}", flush=True)
    routed = np.array([run.first_tier for run in test.replays[Start()].never()])
    chosen = EscalationParams(**starts["map"]["told"]["chosen"])
    return {
        "seed": seed.number,
        "activated_per_flop": seed.activated_per_flop,
        "tier_names": seed.tier_map.tier_names,
        "static": [{"quality": o.quality, "flops": float(o.flops.mean())} for o in test.static],
        "whole": [
            {"quality": o.quality, "flops": float(o.flops.mean())}
            for o in map(outcome_of, seed.whole)
        ],
        "starts": starts,
        "instead_of_map": seed.instead_of_map(),
        "doubt": doubt_table(
            test.replays[Start(0)].never(), seed.difficulty, test.static[-1], routed == 0
        ),
        "readings": seed.readings(chosen, arguments.rounds),
    }


def main() -> None:
    """Measure and write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--calibrate", type=int, default=1500)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/escalation.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "benchmark": "escalation",
        "batch": WALL_BATCH,
        "rounds": arguments.rounds,
        **summarise([measure(folder, arguments) for folder in arguments.runs]),
        "environment": describe_environment(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out.parent / FIGURE).write_bytes(escalation_png(result))


if __name__ == "__main__":
    main()
