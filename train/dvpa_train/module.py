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
from dvpa_train.batches import IGNORED, Part, Rows, assign_tiers
from dvpa_train.config import GuardConfig, OptimizerConfig, StageConfig, StrategyConfig
from dvpa_train.guard import Guard
from dvpa_train.losses import (
    LOSS_CHUNK,
    WHOLE_LOGITS,
    MtpSchedule,
    Scorer,
    StepSums,
    as_they_are,
    in_chunks,
    mtp_targets,
)
from dvpa_train.origins import Origin
from dvpa_train.processes import Processes, limit_waits
from dvpa_train.sharding import clip_gradients, shard
from dvpa_train.teacher import Teacher
from dvpa_train.zero import keep_whole

WITHOUT_MTP = MtpSchedule()


class TierModule(LightningModule):
    """Trains every tier of one model on one stage of the recipe.

    A step is the same on any number of processes: its loss is the sum over all their tokens,
    divided by the count of all their tokens, and so are its gradients.

    Args:
        model: whole; `configure_model` shards it where the strategy does. With an `origin`: on the
            meta device, and filled from there once it is sharded.
        strategy, among: how, and over which processes.
        guard: which steps to refuse.
    """

    def __init__(
        self,
        model: DvpaForCausalLM,
        stage: StageConfig,
        optimizer: OptimizerConfig,
        seed: int,
        strategy: StrategyConfig | None = None,
        among: Processes | None = None,
        guard: GuardConfig | None = None,
        mtp: MtpSchedule = WITHOUT_MTP,
        teacher: Teacher | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.teacher = [teacher]  # in a list: no part of the module, nor of its checkpoints
        self.model, self.stage, self.optimizer_config, self.seed = model, stage, optimizer, seed
        self.strategy, self.among = strategy or StrategyConfig(), among or Processes()
        self.guard, self.origin = Guard(guard or GuardConfig()), origin
        self.balancer = LoadBalancer(model, self.among)
        self.mtp = mtp
        priced = price(model.config).tiers
        self.activated = [tier.activated_params for tier in priced]
        self.mtp_activated = [tier.mtp_activated_params for tier in priced]
        self.training_flops = 0.0
        self.tokens_seen = 0
        self.seconds = 0.0
        self.latest: dict[str, float] = {}  # what the progress display shows
        self.stop_wanted = False  # by this process; all of them stop after the same step
        self.is_stopping = False
        self._sums: StepSums | None = None  # of the micro-batches so far
        # Labels of the step, of all processes: of the next token, and of the one after it.
        self._scored = self._scored_next = 0.0
        self._clock: float | None = None  # when the last step ended
        self._is_laid_out = False

    def configure_model(self) -> None:
        """Lay the model out as the strategy wants it; once."""
        if self._is_laid_out:
            return
        self._is_laid_out = True
        if self.strategy.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        if self.strategy.compile:
            for layer in self.model.model.layers:
                layer.compile()
        if self.strategy.kind == "fsdp2":
            shard(self.model, self.strategy, self.among, self.origin)
        if self.strategy.kind == "deepspeed":
            keep_whole(self.model)
        if self.teacher[0] is not None:
            self.teacher[0].lay_out(self.strategy, self.among)

    def on_train_start(self) -> None:
        """All process groups of the strategy exist now."""
        limit_waits(self.strategy.timeout_s)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Loss of this process's micro-batch; tiers by (seed, stage, step)."""
        self._clock = self._clock or time.perf_counter()
        micro = batch_index % self.strategy.accumulate
        batch = dict(batch)
        scored = batch.pop("scored")
        if micro == 0:
            self._begin_step(scored)
        mtp = self.mtp.weight(self.global_step)
        size = self.among.size
        part = Part(micro * size + self.among.rank, self.strategy.accumulate * size)
        rows = assign_tiers(batch, self.stage, self.seed, self.global_step, part)
        chunk = self.loss_chunk(rows, with_mtp=mtp > 0)
        out = self.model(
            rows.input_ids,
            position_ids=rows.position_ids,
            tiers=rows.tiers,
            use_cache=False,
            with_mtp=mtp > 0,
            with_logits=not chunk,
        )
        read = out.last_hidden_state if chunk else out.logits
        loss, sums = self.loss(read, rows, self._teach(rows, chunk), self._scored, chunk)
        if mtp > 0:
            read = out.mtp_hidden_state if chunk else out.mtp_logits
            further = self.mtp_loss(read, rows, sums, self._scored_next, chunk)
            sums.add_mtp_run(out.mtp_routing.tiers)
            loss = loss + mtp * further
            sums.add_loss(mtp * further)
        self.balancer.observe((*out.routing, out.mtp_routing) if mtp > 0 else out.routing)
        self._sums = sums if self._sums is None else self._sums + sums
        return loss * self._loss_factor

    def loss_chunk(self, rows: Rows, with_mtp: bool = False) -> int:
        """Positions whose logits are made at a time; 0: all at once."""
        if self.strategy.loss_chunk is not None:
            return self.strategy.loss_chunk
        logits = rows.input_ids.numel() * self.model.config.vocab_size * (1 + with_mtp)
        return LOSS_CHUNK if logits > WHOLE_LOGITS else 0

    def _teach(self, rows: Rows, chunk: int = 0) -> Tensor | None:
        """A frozen teacher's logits of the step's examples, [N / 2, S, vocab]; or its states."""
        (teacher,) = self.teacher
        if teacher is None or not rows.paired:
            return None
        ids, tiers = rows.input_ids.chunk(2)[0], rows.tiers.chunk(2)[0]  # those at the top tier
        states: Tensor = (teacher.states if chunk else teacher.logits)(ids, tiers)
        return states

    def loss(
        self,
        read: Tensor,
        rows: Rows,
        taught: Tensor | None = None,
        scored: float | None = None,
        chunk: int = 0,
    ) -> tuple[Tensor, StepSums]:
        """Cross-entropy, mixed with distillation on the lower rows.

        Args:
            read: logits [N, S, vocab]; with `chunk`, the states [N, S, D] that the head reads.
            taught: a frozen teacher's, of the rows' first half; None: the top tier's own.
            scored: what the sums are divided by: labels of the step's examples (default: of these).
            chunk: positions whose logits are made at a time, see `in_chunks`.
        """
        is_scored = rows.labels != IGNORED
        picked, targets = read[is_scored], rows.labels[is_scored]
        sums = StepSums.zeros(self.stage.num_tiers, picked.device)
        scorer = self._scorer(chunk)
        if rows.paired:
            half = len(targets) // 2  # the same examples twice: top rows first, lower rows after
            count = half if scored is None else scored
            columns = [picked[:half], picked[half:], targets[:half]]
            if taught is not None:
                columns.append(taught[is_scored.chunk(2)[0]])
            top_nll, lower_nll, kl, *rest = in_chunks(scorer.pair, columns, -(-chunk // 2))
            share = self.stage.distillation
            top = top_nll.sum() / count
            lower = (1 - share) * (lower_nll.sum() / count) + share * (kl.sum() / count)
            sums.add_distillation(kl.detach())
            if self.stage.distill_top:
                top = (1 - share) * top + share * (rest[0].sum() / count)
            loss, nll = 0.5 * (top + lower), torch.cat((top_nll, lower_nll)).detach()
        else:
            (nll,) = in_chunks(scorer.single, (picked, targets), chunk)
            loss = nll.sum() / (len(nll) if scored is None else scored)
        real = rows.tiers[rows.tiers != NO_TIER]
        sums.add(loss.detach(), nll.detach(), rows.tiers[is_scored], real)
        return loss, sums

    def mtp_loss(
        self, read: Tensor, rows: Rows, sums: StepSums, scored: float | None = None, chunk: int = 0
    ) -> Tensor:
        """Mean cross-entropy of the token after the next over all rows; `sums` takes note of it.

        read: logits [N, S - 1, vocab] of the multi-token prediction module, or its states. Paired
        rows have the same positions scored, so top and lower rows count one half each, as in
        `loss`. `scored`, `chunk` as there; sequences of two tokens have nothing to score.
        """
        starts = None if rows.position_ids is None else rows.position_ids == 0
        targets = mtp_targets(rows.labels, starts)
        is_scored = targets != IGNORED
        columns = (read[is_scored], targets[is_scored])
        nll, right = in_chunks(self._scorer(chunk).guess, columns, chunk)
        halves = 2 if rows.paired else 1
        count = max(len(nll) if scored is None else halves * scored, 1)
        sums.add_mtp(nll.detach(), right)
        return nll.sum() / count

    def _scorer(self, chunk: int) -> Scorer:
        (teacher,), temperature = self.teacher, self.stage.distillation_temperature
        if not chunk:
            return Scorer(temperature=temperature)
        teacher_head = as_they_are if teacher is None else teacher.head
        return Scorer(self.model.lm_head, teacher_head, temperature)

    @property
    def _is_last_micro(self) -> bool:
        return (self.trainer.fit_loop.batch_idx + 1) % self.strategy.accumulate == 0

    @property
    def _loss_factor(self) -> float:
        """Undoes what is divided by later: micro-batches, and processes where they are averaged."""
        averaged = self.strategy.kind in ("ddp", "deepspeed")
        times = 2 if self.strategy.kind == "deepspeed" else 1  # by Lightning, and by itself
        return self.strategy.accumulate**times * (self.among.size if averaged else 1)

    def _begin_step(self, scored: Tensor) -> None:
        """What all processes' labels of the step add up to, and whether one of them wants out."""
        wanted = torch.tensor([*scored.tolist(), float(self.stop_wanted)], device=self.device)
        total = self.among.sum(wanted).tolist()
        self._scored, self._scored_next, self.is_stopping = (
            max(total[0], 1.0),
            total[1],
            total[2] > 0,
        )
        self._sums = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The step's numbers, of all processes; a step that must not be taken ends here.

        Raises:
            RefusedStep: the same on every process.
        """
        if self._is_last_micro:
            self.end_step()
            self.guard.check(self.global_step, self.latest["loss"])

    def end_step(self) -> None:
        """Add up what all processes' micro-batches of the step said."""
        assert self._sums is not None
        sums = StepSums(self.among.sum(self._sums.values))
        self.latest = sums.means()
        per_tier = sums.tokens
        if self.teacher[0] is not None:  # it has read one of the two rows of every example
            self.training_flops += 2.0 * self.activated[-1] * sum(per_tier) / 2
        self.tokens_seen += int(sum(per_tier))
        # forward and backward: three times two FLOPs per activated parameter
        self.training_flops += sum(
            6.0 * n * a for n, a in zip(per_tier, self.activated, strict=True)
        ) + sum(6.0 * n * a for n, a in zip(sums.mtp_tokens, self.mtp_activated, strict=True))

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all processes' shards; DeepSpeed clips its own."""
        if self.strategy.kind == "deepspeed":
            return
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(clip_gradients(trained, self.optimizer_config.gradient_clip, self.among))
        self.latest["gradient_norm"] = norm
        self.guard.check_gradient(self.global_step, norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Optimizer step, then the selection biases (never by gradient)."""
        super().optimizer_step(*args, **kwargs)
        if not self._is_last_micro:  # DeepSpeed is called for each
            return
        self.balancer.gather()
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
            {
                "params": [p for p in trained if p.dim() in (2, 3)],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
            # Sharded experts lie on a mesh of their own: one fused call takes one mesh.
            {"params": [p for p in trained if p.dim() > 3], "weight_decay": config.weight_decay},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            fused=True,
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
            "recent_losses": list(self.guard.recent),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters."""
        counters = dict(checkpoint["dvpa"])
        self.guard.recent.extend(counters.pop("recent_losses"))
        for name, value in counters.items():
            setattr(self, name, value)
