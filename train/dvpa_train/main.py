"""A whole progressive run: tokenizer, stages, difficulty head, tier map, checkpoint, report.

A run folder holds `recipe.json`, `tokenizer/`, `training_state/`, `logs/`, `outcomes/*.jsonl`,
`report.json` and, complete or absent, `checkpoint/`. Running the same recipe into the same folder
resumes it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dvpa.evaluate.reliability import reliability, reliability_png
from dvpa.evaluate.report import calibration_errors
from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa.tasks import TaskSet, train_tokenizer
from dvpa.tiers import TierMap
from dvpa.tiers.calibrate import MIN_REQUESTS, Budget, Split, fit_tier_map
from dvpa_train.config import Recipe
from dvpa_train.difficulty import train_head
from dvpa_train.examples import PARTS, Source, make_source
from dvpa_train.growth import attach_head
from dvpa_train.host_memory import check_host_memory
from dvpa_train.initial import changed_files, fingerprint, load_tokenizer, set_template
from dvpa_train.logbook import Logbook
from dvpa_train.processes import processes
from dvpa_train.stages import Run, StageReport, quiet_lightning
from dvpa_train.strategies import num_threads
from dvpa_train.tokenizer_files import check_tokenizer, copy_tokenizer, tokenizer_hash

FloatArray = npt.NDArray[np.float64]

WHOLE = "test_whole"  # the test requests, each tier reading the prompt itself


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: the calibrated model and everything measured on the way."""

    out: Path
    recipe: Recipe
    model: DvpaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    tasks: dict[str, TaskSet]  # held-out parts
    outcomes: dict[str, OutcomeTable]
    stages: list[StageReport]

    @property
    def checkpoint(self) -> Path:
        """The finished checkpoint folder."""
        return self.out / "checkpoint"


def run_recipe(recipe: Recipe, out: Path, console: Console) -> TrainedRun | None:
    """Run or resume `recipe` into `out`, together with the launcher's other processes.

    The difficulty head and the tier map are the first process's work; the others get None. So does
    the first without `calibration`: `checkpoint/` is the stages' model then.

    Raises:
        ValueError: `out` holds a run of another recipe, or its checkpoint was made under another
            tokenizer; the number of processes does not fit, or the model the memory.
    """
    with Logbook(recipe, out) as logbook:
        return _run(recipe, out, console, logbook)


def _run(recipe: Recipe, out: Path, console: Console, logbook: Logbook) -> TrainedRun | None:
    quiet_lightning()
    transformers_logging.disable_progress_bar()
    with processes(recipe.strategy) as among:
        check_host_memory(recipe, among)
        torch.set_num_threads(num_threads(recipe.threads, among))
        console.quiet |= not among.is_first
        source = make_source(recipe)
        if among.is_first:
            out.mkdir(parents=True, exist_ok=True)
            _claim(out, recipe)
            _make_tokenizer(recipe, source, out / "tokenizer")
        logbook.join(among)
        among.barrier()
        tokenizer = _load_tokenizer(recipe, out / "tokenizer")
        source.prepare(tokenizer)
        if source.describe():
            console.print(f"data          {source.describe()}", soft_wrap=True)
        tasks = _held_out(recipe, source)  # before the training: too few should not cost minutes
        facts = {
            "tokenizer": tokenizer_hash(Path(tokenizer.name_or_path)),
            "recipe": hashlib.sha256((out / "recipe.json").read_bytes()).hexdigest(),
        }
        run = Run(recipe, out, source, tokenizer, console, among, facts, logbook)
        stages = run.train()
    if not among.is_first:
        return None
    if recipe.calibration is None:
        _save_stages(run, out / "checkpoint")
        console.print(f"checkpoint    {out / 'checkpoint'}: no difficulty head, no tier map")
        return None
    model, outcomes = _score_and_calibrate(
        recipe, source, tokenizer, run.load(), tasks, out, console
    )
    last = sum(stage.steps for stage in recipe.stages)
    _log_calibration(logbook, last, model.tier_map, outcomes["test"])
    _save(model, tokenizer, out / "checkpoint")
    return TrainedRun(out, recipe, model, tokenizer, tasks, outcomes, stages)


def _held_out(recipe: Recipe, source: Source) -> dict[str, TaskSet]:
    """The tasks of head, tier map and report."""
    if recipe.calibration is None:
        return {}
    sizes = dict.fromkeys(PARTS, recipe.calibration.items) | {"head": recipe.difficulty.items}
    tasks = source.held_out(sizes)
    for part in ("fit", "calibrate"):
        if len(tasks[part]) < MIN_REQUESTS:
            raise ValueError(
                f"data: {len(tasks[part])} held-out tasks for {part}; at least {MIN_REQUESTS} "
                "are needed (validation_fraction, calibration.items)"
            )
    return tasks


def _claim(out: Path, recipe: Recipe) -> None:
    """Remember the recipe and its model, and refuse to mix two runs in one folder."""
    claim = {"recipe": asdict(recipe), "model": recipe.model_config().to_dict()}
    # What changes the speed but not the course of a run may differ from start to start.
    free = ("expert_parallel", "activation_checkpointing", "loss_chunk", "compile", "timeout_s")
    for name in free:
        del claim["recipe"]["strategy"][name]
    del claim["recipe"]["guard"]["max_rollbacks"]  # one that has run out may be given more
    # The stages do not depend on what comes after them.
    for name in ("difficulty", "calibration", "threads", "checkpoint_every", "keep_checkpoints"):
        del claim["recipe"][name]
    for name in ("loggers", "log_every", "load_every", "wandb_mode"):
        del claim["recipe"][name]
    if recipe.initial_checkpoint is not None:
        claim["initial_checkpoint"] = fingerprint(recipe.initial_checkpoint)
    path, text = out / "recipe.json", json.dumps(claim, indent=1)
    if path.is_file() and path.read_text() != text:
        changed = changed_files(json.loads(path.read_text()), claim)
        if changed:
            raise ValueError(
                f"initial_checkpoint: {recipe.initial_checkpoint}: {', '.join(changed)} changed "
                f"since the run in {out} began; choose another folder or delete it"
            )
        raise ValueError(
            f"{out}: holds a run of another recipe; choose another folder or delete it"
        )
    path.write_text(text)


def _load_tokenizer(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The run's, or the starting checkpoint's; with the recipe's chat template."""
    template = recipe.data.chat_template
    if recipe.initial_checkpoint is not None:
        size = recipe.model_config().vocab_size
        return load_tokenizer(recipe.initial_checkpoint, size, template)
    return set_template(AutoTokenizer.from_pretrained(folder), template)


def _make_tokenizer(recipe: Recipe, source: Source, folder: Path) -> None:
    """Train one on the source's text, once, or copy the one that the recipe names."""
    if recipe.initial_checkpoint is not None:
        return
    if not (folder / "tokenizer_config.json").is_file():
        scratch = folder.with_name("tokenizer.tmp")
        if recipe.tokenizer:
            copy_tokenizer(Path(recipe.tokenizer), scratch)
        else:
            train_tokenizer(source.tokenizer_lines(), recipe.model_config().vocab_size, scratch)
        os.replace(scratch, folder)
    if recipe.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        check_tokenizer(tokenizer, recipe.model_config(), recipe.tokenizer)


def _score_and_calibrate(
    recipe: Recipe,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    model: DvpaForCausalLM,
    tasks: dict[str, TaskSet],
    out: Path,
    console: Console,
) -> tuple[DvpaForCausalLM, dict[str, OutcomeTable]]:
    """Difficulty head, then the tier map; each on held-out tasks of its own."""
    assert recipe.calibration is not None
    config = recipe.sized_config(len(tokenizer))
    model = attach_head(model, config, recipe.seed).eval()
    (out / "outcomes").mkdir(exist_ok=True)
    # Routed requests have their prompt read by the base tier, which scores it on the way.
    outcomes = {"head": source.collect(model, tokenizer, tasks["head"], prompt_tier=0)}
    kept = set(outcomes["head"].ids)
    head_tasks = TaskSet("head", tuple(task for task in tasks["head"] if task.id in kept))
    fitted = train_head(
        model, tokenizer, head_tasks, outcomes["head"], recipe.difficulty, recipe.seed
    )
    console.print(f"difficulty    head loss {fitted['loss_before']:.3f} -> {fitted['loss']:.3f}")
    for part in PARTS[1:]:
        outcomes[part] = source.collect(
            model,
            tokenizer,
            tasks[part],
            prompt_tier=0,
            uncertainty=recipe.data.graded is not None,
        )
        left_out = len(tasks[part]) - len(outcomes[part])
        if left_out:
            console.print(f"{part:<13} {left_out} held-out rows exceed the context: left out")
    outcomes[WHOLE] = source.collect(model, tokenizer, tasks["test"])
    for part, table in outcomes.items():
        table.save_jsonl(out / "outcomes" / f"{part}.jsonl")
    fit, calibrate = (
        Split(outcomes[part].difficulty, outcomes[part].quality) for part in ("fit", "calibrate")
    )
    whole = [tier.activated_params for tier in price(config).tiers]
    budget = Budget.parse(recipe.calibration.budget)
    if budget.fraction is not None:  # of the top tier as it costs without routing
        budget = Budget(mean_activated=budget.fraction * whole[-1])
    model.tier_map = fit_tier_map(
        fit,
        calibrate,
        costs=routed_costs(whole, outcomes["calibrate"]).mean(axis=0).tolist(),
        budget=budget,
        tier_names=config.tier_names,
        kind=recipe.calibration.kind,
    )
    console.print(
        f"calibration   {recipe.calibration.kind} tier map for {recipe.calibration.budget}"
    )
    return model, outcomes


def _log_calibration(logbook: Logbook, step: int, tier_map: TierMap, test: OutcomeTable) -> None:
    """How well the map's success per tier was met on unseen requests, as the step after `step`."""
    if not logbook.is_writing:
        return
    curves, errors = reliability(tier_map, test), calibration_errors(tier_map, test)
    row = {
        f"calibration/{error}/{name}": value
        for error in ("ece", "brier")
        for name, value in zip(tier_map.tier_names, errors[f"{error}_by_tier"], strict=True)
    }
    ece = dict(zip(tier_map.tier_names, errors["ece_by_tier"], strict=True))
    logbook.rewind(step)
    logbook.row(step + 1, {"stage_name": "calibration", **row})
    logbook.figure(step + 1, "calibration", reliability_png(curves, ece), curves)


def routed_costs(activated: Sequence[float], requests: OutcomeTable) -> FloatArray:
    """Activated parameters of each request at each answering tier [N, T].

    The base tier reads the prompt up to its last token; that token and the answer run at the tier.
    Divided by the mean number of tokens a request has, so that the mean over requests is the mean
    over tokens.
    """
    read = (requests.prompt_tokens - 1).astype(float)[:, None]
    answered = requests.completion_tokens[:, :1].astype(float)
    total = activated[0] * read + np.asarray(activated, dtype=float) * answered
    return total / float((read + answered).mean())


def _save_stages(run: Run, folder: Path) -> None:
    """The last stage's model as it is; its weights are linked, not copied, where that can be."""
    trained = run.folder(len(run.recipe.stages) - 1) / "model"
    if not trained.is_dir():  # adapters only
        _save(run.load(), run.tokenizer, folder)
        return
    with _replaced(folder) as scratch:
        shutil.copytree(trained, scratch, copy_function=_link)
        run.tokenizer.save_pretrained(scratch)


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without hard links
            pass
    shutil.copy2(source, target)


def _save(model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with _replaced(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Complete or absent: written beside, then renamed."""
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    yield scratch
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
