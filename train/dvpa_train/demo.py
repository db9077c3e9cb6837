"""`dvpa demo`: the whole idea in minutes on a CPU; leaves a table, a report and a checkpoint.

One seed runs in `OUT`; with more seeds each runs in `OUT/seed-N` (two processes of one thread each)
and the report in `OUT` joins them. Same recipe, same seed, same folder: a finished stage is not
trained again.
"""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dvpa.evaluate.report import aggregate_reports, build_report, write_report
from dvpa.model import DvpaForCausalLM
from dvpa.model.answer import answer, read_prompt
from dvpa.model.cache_name import CACHE_NAME
from dvpa.pricing import price
from dvpa.tasks import Task
from dvpa.tasks.encoding import encode_tasks
from dvpa_train.baselines import baseline_rows
from dvpa_train.config import load_recipe
from dvpa_train.main import WHOLE, TrainedRun, routed_costs, run_recipe
from dvpa_train.processes import end_with
from dvpa_train.tables import print_report

RECIPE = "train/nano.yaml"
MAX_ANSWER_TOKENS = 16


def run_demo(
    out: Path,
    seeds: int = 1,
    seed: int = 0,
    baselines: bool = False,
    overrides: list[str] | None = None,
    recipe: str = RECIPE,
) -> dict[str, Any]:
    """Train, calibrate, compare, answer; returns the report.

    Writes report.json, report.html and frontier.png.

    Args:
        out: folder of the run.
        seeds: how many, counted from `seed`; each trains its own model.
        baselines: also train the ordinary MoE and one specialist per tier (several times as long).
        overrides: `key.sub=value` changes to the recipe.

    Raises:
        ValueError: `seeds` is below 1, a bad override, or `out` holds another run.
    """
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} must be 1 or more")
    started = time.perf_counter()
    wanted = [seed + i for i in range(seeds)]
    folders = [out] if seeds == 1 else [out / f"seed-{number}" for number in wanted]
    jobs = [
        (folder, number, baselines, overrides or [], recipe)
        for folder, number in zip(folders, wanted, strict=True)
    ]
    if seeds == 1:
        reports = [_one_seed(*jobs[0])]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, spawn, end_with, (os.getpid(),)) as pool:
            reports = list(pool.map(_one_seed, *zip(*jobs, strict=True)))
    report = reports[0] if seeds == 1 else aggregate_reports(reports)
    report["wall_seconds"] = time.perf_counter() - started
    files = write_report(report, out)
    print_report(report, Console(), files, folders[0] / "checkpoint")
    return report


def _one_seed(
    out: Path, seed: int, baselines: bool, overrides: list[str], recipe_name: str
) -> dict[str, Any]:
    """The report of one seed."""
    started = time.perf_counter()
    console = Console(stderr=True)
    recipe = load_recipe(recipe_name, [f"seed={seed}", *overrides])
    trained = run_recipe(recipe, out, console)
    assert trained is not None, "the demo is one process"
    tables, tasks = trained.outcomes, trained.tasks
    whole_costs = [tier.activated_params for tier in price(trained.model.config).tiers]
    report = build_report(
        tables["fit"],
        tables["calibrate"],
        tables["test"],
        trained.model.tier_map,
        seed=seed,
        questions={task.id: task.question for part in tasks.values() for task in part},
        overhead=head_overhead(trained),
        request_costs=routed_costs(whole_costs, tables["test"]),
        ms=measure_ms(trained),
        whole=tables[WHOLE],
        whole_costs=whole_costs,
        samples=_samples(trained),
        wall_seconds=time.perf_counter() - started,
    )
    report["stages"] = [stage.__dict__ for stage in trained.stages]
    if baselines:
        report["routers"].update(baseline_rows(trained, console))
        report["wall_seconds"] = time.perf_counter() - started
    (out / "seed_report.json").write_text(json.dumps(report))
    return report


def head_overhead(trained: TrainedRun) -> list[float]:
    """What the adaptive route adds, in activated parameters per token of a request, by chosen tier.

    The head and its logit lens once per request, without the lens where it is what the base tier
    says of the next token anyway; above the base tier also the prompt's last token, which the base
    tier has read for the score and the chosen tier reads again.
    """
    test, config = trained.outcomes["test"], trained.model.config
    tokens = float((test.prompt_tokens - 1 + test.completion_tokens[:, 0]).mean())
    cost = price(config)
    return [cost.scoring_flops(0, tier, "base") / 2 / tokens for tier in range(config.num_tiers)]


def measure_ms(trained: TrainedRun, requests: int = 10, rounds: int = 3) -> dict[str, list[float]]:
    """Measured wall milliseconds per request by answering tier [T], one request at a time, greedy.

    `whole`: the tier reads the prompt itself. `routed`: the base tier reads the prompt up to its
    last token. `adaptive`: the base tier reads all of it and the head scores it. The mean over
    requests of the median over rounds, tiers and ways interleaved.
    """
    model, tokenizer = trained.model, trained.tokenizer
    pairs = encode_tasks(tokenizer, list(trained.tasks["test"])[:requests])
    prompts = [torch.tensor([prompt]) for prompt, _ in pairs]
    ways = {"whole": _read_nothing, "routed": _read_unscored, "adaptive": _read_scored}
    num_tiers = model.config.num_tiers
    seconds = {way: np.zeros((rounds + 1, num_tiers, len(prompts))) for way in ways}
    for turn in range(rounds + 1):  # the first one only warms up
        for number, prompt in enumerate(prompts):
            for tier in range(num_tiers):
                for way, read in ways.items():
                    began = time.perf_counter()
                    model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        tiers=tier,
                        **{CACHE_NAME: read(model, prompt)},
                        max_new_tokens=MAX_ANSWER_TOKENS,
                        do_sample=False,
                    )
                    seconds[way][turn, tier, number] = time.perf_counter() - began
    return {
        way: (1000 * np.median(measured[1:], axis=0).mean(axis=1)).tolist()
        for way, measured in seconds.items()
    }


def _read_nothing(model: DvpaForCausalLM, prompt: torch.Tensor) -> None:
    """The answering tier reads the prompt."""


def _read_unscored(model: DvpaForCausalLM, prompt: torch.Tensor) -> Any:
    """The base tier's cache of all but the last token, for a router that needs no score."""
    with torch.inference_mode():
        return model.model(prompt[:, :-1], tiers=0, use_cache=True).past_key_values


def _read_scored(model: DvpaForCausalLM, prompt: torch.Tensor) -> Any:
    """The same cache from the pass that also scores the prompt."""
    return read_prompt(model, prompt)[1]


def _samples(trained: TrainedRun) -> list[dict[str, Any]]:
    """One request per level, answered by the finished checkpoint, with its telemetry."""
    chosen: dict[int, Task] = {}
    for task in trained.tasks["test"]:
        chosen.setdefault(task.level, task)
    tasks = [chosen[level] for level in sorted(chosen)][:5]
    answers = answer(
        trained.model,
        trained.tokenizer,
        [task.question for task in tasks],
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    return [
        {
            "question": task.question,
            "expected": task.answer,
            "text": given.text,
            "telemetry": given.telemetry.to_dict(),
        }
        for task, given in zip(tasks, answers, strict=True)
    ]
