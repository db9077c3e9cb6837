"""`dvpa demo`: the whole idea in minutes on a CPU; leaves a table, a report and a checkpoint.

One seed runs in `OUT`; with more seeds each runs in `OUT/seed-N` (two processes of one thread each)
and the report in `OUT` joins them. Same recipe, same seed, same folder: a finished stage is not
trained again.
"""

import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dvpa.evaluate.report import aggregate_reports, build_report, write_report
from dvpa.model.answer import answer
from dvpa.pricing import price
from dvpa.tasks import Task
from dvpa.tasks.encoding import encode_tasks, left_pad
from dvpa_train.baselines import baseline_rows
from dvpa_train.config import load_recipe
from dvpa_train.main import WHOLE, TrainedRun, run_recipe
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
        with ProcessPoolExecutor(max_workers=2, mp_context=spawn) as pool:
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
    tables, tasks = trained.outcomes, trained.tasks
    report = build_report(
        tables["fit"],
        tables["calibrate"],
        tables["test"],
        trained.model.tier_map,
        seed=seed,
        questions={task.id: task.question for part in tasks.values() for task in part},
        overhead=head_overhead(trained),
        ms_by_tier=measure_ms(trained),
        whole=tables[WHOLE],
        whole_costs=[tier.activated_params for tier in price(trained.model.config).tiers],
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

    The head and its logit lens once per request; above the base tier also the prompt's last token,
    which the base tier has read for the score and the chosen tier reads again.
    """
    test = trained.outcomes["test"]
    tokens = float((test.prompt_tokens - 1 + test.completion_tokens[:, 0]).mean())
    cost = price(trained.model.config)
    head = cost.head_flops_per_request / 2 / tokens
    again = cost.probe_flops_per_token / 2 / tokens
    return [head if tier == 0 else head + again for tier in range(trained.model.config.num_tiers)]


def measure_ms(trained: TrainedRun, batch: int = 32, rounds: int = 5) -> list[float]:
    """Median wall milliseconds per request at each tier; greedy, in batches, tiers interleaved."""
    model, tokenizer = trained.model, trained.tokenizer
    pairs = encode_tasks(tokenizer, list(trained.tasks["test"])[:batch])
    ids, mask = left_pad([prompt for prompt, _ in pairs], tokenizer.pad_token_id)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    seconds: list[list[float]] = [[] for _ in range(model.config.num_tiers)]
    for _ in range(rounds):
        for tier, measured in enumerate(seconds):
            began = time.perf_counter()
            model.generate(**inputs, tiers=tier, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
            measured.append(time.perf_counter() - began)
    return [1000 * statistics.median(measured) / len(ids) for measured in seconds]


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
