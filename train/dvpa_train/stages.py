"""Running the stages of a recipe one after the other, and resuming them after any kill.

`training_state/<i>-<name>/` of a run holds `last.ckpt` while the stage runs, then `model/` and last
of all `done.json`: a stage counts as finished only with that file.
"""

import json
import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from dvpa.model import DvpaForCausalLM
from dvpa_train.batches import collate
from dvpa_train.callbacks import AtomicCheckpoint, MetricLog, ProgressLine
from dvpa_train.config import Recipe, StageConfig
from dvpa_train.examples import BatchDataset, Source
from dvpa_train.finetune import FineTuning
from dvpa_train.growth import grow
from dvpa_train.module import TierModule


@dataclass(frozen=True)
class StageReport:
    """What one stage cost."""

    name: str
    steps: int
    tokens: int
    training_flops: float
    seconds: float


@dataclass
class Run:
    """One recipe being run into one folder."""

    recipe: Recipe
    out: Path
    source: Source
    tokenizer: PreTrainedTokenizerBase
    console: Console
    tuning: FineTuning | None = None  # of a run that starts from a checkpoint

    def __post_init__(self) -> None:
        if self.recipe.initial_checkpoint is not None:
            self.tuning = FineTuning(self.recipe, self.console)

    def folder(self, index: int) -> Path:
        """State folder of a stage."""
        return self.out / "training_state" / f"{index}-{self.recipe.stages[index].name}"

    def train(self) -> tuple[DvpaForCausalLM, list[StageReport]]:
        """Run, or resume, every training stage; returns the fully grown model."""
        reports: list[StageReport] = []
        model: DvpaForCausalLM | None = None
        loggers = self._loggers()
        for index, stage in enumerate(self.recipe.stages):
            done = self.folder(index) / "done.json"
            if done.is_file():
                reports.append(StageReport(**json.loads(done.read_text())))
                model = None  # read back only if a later stage needs it
                continue
            start = self._starting_model(index, model)
            model, report = self._run_stage(index, stage, start, loggers)
            reports.append(report)
        if model is None:
            model = self._load(len(self.recipe.stages) - 1)
        if self.tuning is not None:
            model = self.tuning.finish(model, self.out)
        return model, reports

    def _starting_model(self, index: int, previous: DvpaForCausalLM | None) -> DvpaForCausalLM:
        """The model a stage begins with: fresh, or the last one, grown to the stage's tiers."""
        if self.tuning is not None and index == 0:
            return self.tuning.begin()
        stage = self.recipe.stages[index]
        config = self.recipe.sized_config(len(self.tokenizer)).truncate(stage.num_tiers)
        if index == 0:
            torch.manual_seed(self.recipe.seed)
            return DvpaForCausalLM(config)
        if previous is None:
            previous = self._load(index - 1)
        if previous.config.num_tiers == stage.num_tiers:
            return previous
        return grow(previous, config, seed=self.recipe.seed + index)

    def _load(self, index: int) -> DvpaForCausalLM:
        if self.tuning is not None:
            return self.tuning.restore(self.folder(index))
        return DvpaForCausalLM.from_pretrained(self.folder(index) / "model")

    def _run_stage(
        self, index: int, stage: StageConfig, model: DvpaForCausalLM, loggers: list[Any]
    ) -> tuple[DvpaForCausalLM, StageReport]:
        recipe, folder = self.recipe, self.folder(index)
        before = recipe.stages[:index]
        teacher = None
        if self.tuning is not None:
            stage, teacher = self.tuning.stage(stage), self.tuning.teacher(stage, model)
        module = TierModule(model.train(), stage, recipe.optimizer, recipe.seed, teacher=teacher)
        trainer = Trainer(
            max_steps=stage.steps,
            accelerator="cpu" if not torch.cuda.is_available() else "auto",
            devices=1,
            logger=loggers,
            callbacks=[
                AtomicCheckpoint(folder, recipe.checkpoint_every),
                ProgressLine(self.console, recipe.model_config().tier_names),
                MetricLog(recipe.log_every, sum(s.steps for s in before)),
            ],
            gradient_clip_val=recipe.optimizer.gradient_clip,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        first = sum(s.steps * s.batch_size for s in before)
        dataset = BatchDataset(self.source, stage, first)
        pad_id = self.tokenizer.pad_token_id
        checkpoint = folder / "last.ckpt"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", module="torchdata")
            loader = StatefulDataLoader(
                dataset,
                batch_size=None,
                collate_fn=lambda examples: collate(examples, pad_id, recipe.data.prompt_loss),
            )
            trainer.fit(
                module,
                loader,
                ckpt_path=checkpoint if checkpoint.is_file() else None,
                weights_only=False,
            )
        if trainer.interrupted:
            raise KeyboardInterrupt
        report = StageReport(
            stage.name, stage.steps, module.tokens_seen, module.training_flops, module.seconds
        )
        finish_stage(folder, module.model, report, self.tuning)
        return module.model, report

    def _loggers(self) -> list[Any]:
        loggers: list[Any] = [CSVLogger(self.out, name="logs")]
        mode = os.environ.get("WANDB_MODE", self.recipe.wandb_mode)
        if mode != "disabled":
            os.environ.setdefault("WANDB_SILENT", "true")  # its banner would tear the progress line
            loggers.append(
                WandbLogger(
                    project="dvpa",
                    name=self.recipe.name,
                    save_dir=self.out,
                    offline=mode != "online",
                )
            )
        return loggers


def finish_stage(
    folder: Path, model: DvpaForCausalLM, report: StageReport, tuning: FineTuning | None = None
) -> None:
    """Save the stage's model, then the marker that makes it count, then drop the resume file."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if tuning is None:
        model.save_pretrained(folder / "model")
    else:
        tuning.save(model, folder)
    temporary = folder / "done.tmp"
    temporary.write_text(json.dumps(report.__dict__))
    os.replace(temporary, folder / "done.json")
    (folder / "last.ckpt").unlink(missing_ok=True)


def quiet_lightning() -> None:
    """Lightning's own start-up lines say nothing a reader of the progress line needs."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
