"""The LightningModule: a step, an optimizer, nothing of the model's inside.

One forward pass carries all tiers of the step. Rows at the top tier are the teacher of the same
examples at a lower tier in the same pass (in-place distillation), so no second model and no second
pass is needed; fine-tuning may put a frozen teacher in their place.
"""

import math
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dvpa.model import DvpaForCausalLM
from dvpa.model.router import NO_TIER
from dvpa.pricing import price
from dvpa_train.balance import LoadBalancer
from dvpa_train.batches import IGNORED, Rows, assign_tiers
from dvpa_train.config import OptimizerConfig, StageConfig
from dvpa_train.losses import distillation_kl, token_nll
from dvpa_train.teacher import Teacher


class TierModule(LightningModule):
    """Trains every tier of one model on one stage of the recipe."""

    def __init__(
        self,
        model: DvpaForCausalLM,
        stage: StageConfig,
        optimizer: OptimizerConfig,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.teacher = [teacher]  # in a list: no part of the module, nor of its checkpoints
        self.model, self.stage, self.optimizer_config, self.seed = model, stage, optimizer, seed
        self.balancer = LoadBalancer(model)
        self.activated = [tier.activated_params for tier in price(model.config).tiers]
        self.training_flops = 0.0
        self.tokens_seen = 0
        self.seconds = 0.0
        self.latest: dict[str, float] = {}  # what the progress display shows
        self._clock: float | None = None  # when the last step ended

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Mean loss of the step's rows; tiers by (seed, stage, step)."""
        self._clock = self._clock or time.perf_counter()
        rows = assign_tiers(batch, self.stage, self.seed, self.global_step)
        out = self.model(rows.input_ids, tiers=rows.tiers, use_cache=False)
        self.balancer.observe(out.routing)
        loss, parts = self.loss(out.logits, rows, self._teach(rows))
        self._count(rows)
        self.latest = {"loss": float(loss.detach()), **parts}
        return loss

    def _teach(self, rows: Rows) -> Tensor | None:
        """A frozen teacher's logits of the step's examples, [N / 2, S, vocab]."""
        (teacher,) = self.teacher
        if teacher is None or not rows.paired:
            return None
        ids, tiers = rows.input_ids.chunk(2)[0], rows.tiers.chunk(2)[0]  # those at the top tier
        self.training_flops += 2.0 * self.activated[-1] * int((tiers != NO_TIER).sum())
        return teacher.logits(ids, tiers)

    def loss(
        self, logits: Tensor, rows: Rows, taught: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy, mixed with distillation on the lower rows; and the mean nll per tier.

        `taught`: a frozen teacher's logits of the first half of the rows; None: the top tier's own.
        """
        scored = rows.labels != IGNORED
        picked, targets = logits[scored], rows.labels[scored]
        nll = token_nll(picked, targets)
        with torch.no_grad():
            tiers = rows.tiers[scored]
            parts = {
                f"nll/tier_{t}": float(nll[tiers == t].mean())
                for t in range(self.stage.num_tiers)
                if (tiers == t).any()
            }
        if not rows.paired:
            return nll.mean(), parts
        half = len(nll) // 2  # the same examples twice: top rows first, lower rows after
        teacher = picked[:half] if taught is None else taught[scored.chunk(2)[0]]
        temperature, share = self.stage.distillation_temperature, self.stage.distillation
        kl = distillation_kl(picked[half:], teacher, temperature)
        top, lower = nll[:half].mean(), (1 - share) * nll[half:].mean() + share * kl.mean()
        parts["distillation"] = float(kl.detach().mean())
        if self.stage.distill_top:
            top_kl = distillation_kl(picked[:half], teacher, temperature).mean()
            top = (1 - share) * top + share * top_kl
            parts["distillation_top"] = float(top_kl.detach())
        return 0.5 * (top + lower), parts

    def _count(self, rows: Rows) -> None:
        real = rows.tiers[rows.tiers != NO_TIER]
        per_tier = torch.bincount(real, minlength=len(self.activated)).tolist()
        self.tokens_seen += sum(per_tier)
        # forward and backward: three times two FLOPs per activated parameter
        self.training_flops += sum(
            6.0 * n * a for n, a in zip(per_tier, self.activated, strict=True)
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Optimizer step, then the selection biases (never by gradient)."""
        super().optimizer_step(*args, **kwargs)
        if self.global_step % 50 == 1:
            self.latest |= self.balancer.max_violation()
        frozen = self.global_step > self.stage.steps * (1 - self.stage.bias_frozen_fraction)
        self.balancer.update(0.0 if frozen else self.stage.bias_update_rate)
        now = time.perf_counter()
        self.seconds += now - (self._clock or now)
        self._clock = now

    def configure_optimizers(self) -> Any:
        """AdamW, weight decay on matrices only; warm-up, then cosine between the stage's scales."""
        config = self.optimizer_config
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rate_scale(self, step: int) -> float:
        """Factor on the learning rate at a step of this stage."""
        stage = self.stage
        start, end = stage.learning_rate_scale
        progress = min(step / max(stage.steps, 1), 1.0)
        scale = end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
        return scale * min(1.0, (step + 1) / max(stage.warmup_steps, 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counters travel with the weights."""
        checkpoint["dvpa"] = {
            "training_flops": self.training_flops,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters."""
        for name, value in checkpoint["dvpa"].items():
            setattr(self, name, value)
