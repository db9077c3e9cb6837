"""Running the stages of a recipe one after the other, and resuming them after any kill.

`training_state/<i>-<name>/` of a run holds `checkpoints/` while the stage runs, then `model/` and
last of all `done.json`: a stage counts as finished only with that file.
"""

import gc
import json
import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa_train.batches import Part, collate_step
from dvpa_train.callbacks import ProgressLine
from dvpa_train.checkpoints import Checkpoints, find_latest
from dvpa_train.config import Recipe, StageConfig
from dvpa_train.consolidate import write_model
from dvpa_train.examples import BatchDataset, Source, check_batch
from dvpa_train.finetune import FineTuning
from dvpa_train.growth import grow
from dvpa_train.guard import RefusedStep
from dvpa_train.interrupts import Interrupts
from dvpa_train.logbook import Logbook
from dvpa_train.losses import MtpSchedule
from dvpa_train.metric_log import LogPlace, MetricLog
from dvpa_train.module import TierModule
from dvpa_train.origins import Resumed
from dvpa_train.peak import find_peak
from dvpa_train.processes import Processes
from dvpa_train.starts import Start, sharded_start
from dvpa_train.strategies import trainer_arguments


@dataclass(frozen=True)
class StageReport:
    """What one stage cost."""

    name: str
    steps: int
    tokens: int
    training_flops: float
    seconds: float
    skipped: tuple[int, ...] = ()  # batches left out by the guard


@dataclass
class Run:
    """One recipe being run into one folder, by every process of it.

    `facts`: what a checkpoint must have been made under to be resumed from.
    """

    recipe: Recipe
    out: Path
    source: Source
    tokenizer: PreTrainedTokenizerBase
    console: Console
    among: Processes
    facts: dict[str, Any]
    logbook: Logbook
    tuning: FineTuning | None = None  # of a run that starts from a checkpoint

    def __post_init__(self) -> None:
        if self.recipe.initial_checkpoint is not None:
            self.tuning = FineTuning(self.recipe, self.console)

    def folder(self, index: int) -> Path:
        """State folder of a stage."""
        return self.out / "training_state" / f"{index}-{self.recipe.stages[index].name}"

    def train(self) -> list[StageReport]:
        """Run, or resume, every training stage; `folder(i) / "model"` then holds each one's model.

        Raises:
            ValueError: a stage's batch does not divide among the processes.
            Stopped: a signal asked for it; a checkpoint has been saved.
        """
        for stage in self.recipe.stages:
            check_batch(stage, self.among.size * self.recipe.strategy.accumulate)
        reports: list[StageReport] = []
        model: DvpaForCausalLM | None = None
        for index, stage in enumerate(self.recipe.stages):
            done = self.folder(index) / "done.json"
            if done.is_file():
                reports.append(StageReport(**json.loads(done.read_text())))
                model = None  # read back only if a later stage needs it
                continue
            if self.logbook.is_wanted and self.logbook.peak is None:
                self.logbook.peak = find_peak(self.recipe.strategy.precision, self.among)
                self.console.print(f"log           {self.logbook.describe()}", soft_wrap=True)
            first = sum(
                s.steps * s.batch_size + len(r.skipped) * s.batch_size
                for s, r in zip(self.recipe.stages, reports, strict=False)
            )
            model, report = self._run_guarded(index, stage, first, model, reports)
            reports.append(report)
        return reports

    def load(self) -> DvpaForCausalLM:
        """The fully grown model."""
        model = self._load(len(self.recipe.stages) - 1)
        return model if self.tuning is None else self.tuning.finish(model, self.out)

    def _run_guarded(
        self,
        index: int,
        stage: StageConfig,
        first: int,
        previous: DvpaForCausalLM | None,
        done: Sequence[StageReport],
    ) -> tuple[DvpaForCausalLM | None, StageReport]:
        """A stage; a refused step goes back to the last checkpoint and round its batch."""
        noted = self.folder(index) / "skipped.json"
        while True:
            skipped = json.loads(noted.read_text()) if noted.is_file() else []
            gc.collect()  # Lightning's cycles hold the last attempt's weights and optimizer
            try:
                return self._run_stage(
                    index, stage, self._start(index, previous), first, skipped, done
                )
            except RefusedStep as refused:
                if len(skipped) >= self.recipe.guard.max_rollbacks:
                    raise RuntimeError(
                        f"stage {stage.name}: {refused}; {len(skipped)} batches have been left out "
                        "already (guard.max_rollbacks)"
                    ) from refused
                data = BatchDataset(self.source, stage, first, skipped=skipped)
                number = data.number(refused.step)
                self.console.print(f"{stage.name}: {refused}: back, without batch {number}")
                self.among.barrier()  # all have read the old note
                if self.among.is_first:
                    noted.parent.mkdir(parents=True, exist_ok=True)
                    noted.write_text(json.dumps([*skipped, number]))
                self.among.barrier()
                previous = None

    def _start(self, index: int, previous: DvpaForCausalLM | None) -> Start:
        """What a stage begins with: fresh, or the last one, grown to the stage's tiers."""
        if self.recipe.strategy.kind == "fsdp2":
            return self._sharded_start(index)
        return Start(self._whole_start(index, previous))

    def _sharded_start(self, index: int) -> Start:
        recipe, folder = self.recipe, None
        if index:
            folder = self.folder(index - 1) / "model"
        elif self.tuning is not None:
            folder = self.tuning.folder
        start = sharded_start(self._config(index), folder, recipe.seed + index)
        if self.tuning is not None:
            self.tuning.freeze(start.model)
        return start

    def _whole_start(self, index: int, previous: DvpaForCausalLM | None) -> DvpaForCausalLM:
        if self.tuning is not None and index == 0:
            return self.tuning.begin()
        config = self._config(index)
        if index == 0:
            torch.manual_seed(self.recipe.seed)
            return DvpaForCausalLM(config)
        if previous is None:
            previous = self._load(index - 1)
        if previous.config.num_tiers == config.num_tiers:
            return previous
        return grow(previous, config, seed=self.recipe.seed + index)

    def _config(self, index: int) -> DvpaConfig:
        """Of the model of a stage."""
        num_tiers = self.recipe.stages[index].num_tiers
        return self.recipe.sized_config(len(self.tokenizer)).truncate(num_tiers)

    def _load(self, index: int) -> DvpaForCausalLM:
        if self.tuning is not None:
            return self.tuning.restore(self.folder(index))
        return DvpaForCausalLM.from_pretrained(self.folder(index) / "model")

    def _run_stage(
        self,
        index: int,
        stage: StageConfig,
        start: Start,
        first: int,
        skipped: Sequence[int],
        done: Sequence[StageReport],
    ) -> tuple[DvpaForCausalLM | None, StageReport]:
        recipe, folder, among = self.recipe, self.folder(index), self.among
        strategy, clip = recipe.strategy, recipe.optimizer.gradient_clip
        facts = dict(self.facts)
        if strategy.kind == "deepspeed":  # its checkpoints are read back by as many processes
            facts["processes"] = among.size
        found, passed_over = find_latest(folder, facts, among)
        for problem in passed_over:
            self.console.print(f"{stage.name}: not resumed from {problem}")
        if found is not None:
            self.console.print(f"{stage.name:<13} resumed from step {found.step}")
        teacher = None
        if self.tuning is not None:
            stage, teacher = self.tuning.stage(stage), self.tuning.teacher(stage, start.model)
        origin = Resumed() if found and start.origin else start.origin
        if origin is not None:
            self.console.print(f"{stage.name:<13} {origin.describe()}", soft_wrap=True)
        first_step = sum(s.steps for s in recipe.stages[:index])
        module = TierModule(
            start.model.train(),
            stage,
            recipe.optimizer,
            recipe.seed,
            strategy,
            among,
            recipe.guard,
            MtpSchedule(*recipe.mtp_weights(), first_step, sum(s.steps for s in recipe.stages)),
            teacher,
            origin,
        )
        checkpoints = Checkpoints(
            folder,
            recipe.checkpoint_every,
            recipe.keep_checkpoints,
            self.facts,
            among,
            strategy.timeout_s,
        )
        log = MetricLog(
            self.logbook,
            LogPlace(
                index,
                first_step,
                sum(report.tokens for report in done),
                sum(report.training_flops for report in done),
            ),
            recipe.log_every,
            recipe.load_every,
        )
        trainer = Trainer(
            max_steps=stage.steps,
            logger=False,
            callbacks=[
                # First: what a checkpoint's step has logged is not taken again.
                *([log] if self.logbook.is_wanted else []),
                checkpoints,
                Interrupts(checkpoints),
                ProgressLine(self.console, recipe.model_config().tier_names),
            ],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **trainer_arguments(strategy, among, clip),
        )
        dataset = BatchDataset(
            self.source, stage, first, Part(among.rank, among.size), strategy.accumulate, skipped
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", module="torchdata")
            loader = StatefulDataLoader(
                dataset,
                batch_size=None,
                collate_fn=partial(
                    collate_step,
                    pad_id=self.tokenizer.pad_token_id,
                    prompt_loss=recipe.data.prompt_loss,
                ),
            )
            trainer.fit(
                module, loader, ckpt_path=found.folder if found else None, weights_only=False
            )
        if trainer.interrupted:
            raise KeyboardInterrupt
        report = StageReport(
            stage.name,
            stage.steps,
            module.tokens_seen,
            module.training_flops,
            module.seconds,
            tuple(skipped),
        )
        finish_stage(folder, module.model, report, among, self.tuning)
        is_whole = strategy.kind in ("single", "ddp")
        return module.model if is_whole else None, report


def finish_stage(
    folder: Path,
    model: DvpaForCausalLM,
    report: StageReport,
    among: Processes,
    tuning: FineTuning | None = None,
) -> None:
    """Save the stage's model, then the marker that makes it count, then drop the checkpoints."""
    if among.is_first:
        shutil.rmtree(folder / "model", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    if tuning is not None and tuning.adapted is not None:
        if among.is_first:
            tuning.save(model, folder)
    else:
        write_model(model, folder / "model", among)
    if among.is_first:
        temporary = folder / "done.tmp"
        temporary.write_text(json.dumps(report.__dict__))
        os.replace(temporary, folder / "done.json")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    among.barrier()


def quiet_lightning() -> None:
    """Lightning's own start-up lines say nothing a reader of the progress line needs."""
    if (
        not torch.cuda.is_available()
    ):  # DeepSpeed would find that out aloud, wherever it is imported
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # True, and meant, in a run of one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
