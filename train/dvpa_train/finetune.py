"""What differs when a run starts from a checkpoint: its first model, its teacher, what is kept.

Full fine-tuning keeps a whole model per stage, as training does. With LoRA the starting weights
never change, so a stage keeps its adapter only, in peft's format; after the last one the adapter is
merged and an ordinary model goes on to the difficulty head and calibration.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dvpa.model import DvpaForCausalLM
from dvpa_train.config import Recipe, StageConfig
from dvpa_train.initial import load_initial
from dvpa_train.lora import add_adapters, merge, num_trained, restore_adapters, save_adapters
from dvpa_train.parts import freeze
from dvpa_train.starts import Start, sharded_start
from dvpa_train.teacher import AdapterTeacher, FrozenTeacher, Teacher

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER, MODEL = "adapter", "model"


@dataclass
class FineTuning:
    """The starting checkpoint of one run, and the adapters in the model that is being trained."""

    recipe: Recipe
    console: Console
    adapted: "PeftModel | None" = None

    def begin(self) -> DvpaForCausalLM:
        """The model of the first stage."""
        model, lora = self._load(), self.recipe.lora
        if lora is not None:
            base = self.recipe.initial_checkpoint
            self.adapted = add_adapters(model, lora, self.recipe.seed, base)
        return self.freeze(model)

    def restore(self, folder: Path) -> DvpaForCausalLM:
        """The model as the stage of this state folder left it."""
        if self.recipe.lora is None:
            return self.freeze(DvpaForCausalLM.from_pretrained(folder / MODEL))
        model = self._load()
        self.adapted = restore_adapters(model, self.recipe.lora, folder / ADAPTER)
        return model

    def save(self, model: DvpaForCausalLM, folder: Path) -> None:
        """Keep what the stage has changed."""
        if self.adapted is None:
            model.save_pretrained(folder / MODEL)
            return
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        save_adapters(self.adapted, folder / ADAPTER)

    def stage(self, stage: StageConfig) -> StageConfig:
        """The stage as it is run: selection biases that are frozen do not move."""
        kept = self.recipe.lora is not None or "tier_bias" in self.recipe.freeze
        return replace(stage, bias_update_rate=0.0) if kept else stage

    def teacher(self, stage: StageConfig, model: DvpaForCausalLM) -> Teacher | None:
        """The starting checkpoint's top tier, if the stage asks for it."""
        if stage.teacher == "in_place":
            return None
        if self.adapted is not None:
            return AdapterTeacher(self.adapted, model)
        if self.recipe.strategy.kind == "fsdp2":
            return FrozenTeacher(sharded_start(model.config, self.folder, self.recipe.seed))
        return FrozenTeacher(Start(self._load()))

    def finish(self, model: DvpaForCausalLM, out: Path) -> DvpaForCausalLM:
        """An ordinary model; with LoRA the merged one, its adapter kept in `out/adapter`."""
        if self.adapted is None:
            return model.requires_grad_(True)
        shutil.rmtree(out / ADAPTER, ignore_errors=True)
        save_adapters(self.adapted, out / ADAPTER)
        model, self.adapted = merge(self.adapted), None
        return model

    @property
    def folder(self) -> Path:
        """The starting checkpoint's."""
        assert self.recipe.initial_checkpoint is not None
        return Path(self.recipe.initial_checkpoint)

    def _load(self) -> DvpaForCausalLM:
        return load_initial(self.folder)

    def freeze(self, model: DvpaForCausalLM) -> DvpaForCausalLM:
        """Leave only what is to be trained, and say how much that is; the model."""
        if self.adapted is None:
            freeze(model, self.recipe.freeze)
        total = sum(p.numel() for p in model.parameters())
        self.console.print(
            f"fine-tuning   {self.recipe.initial_checkpoint}: {num_trained(model):,} of "
            f"{total:,} parameters are trained",
            soft_wrap=True,
        )
        return model
