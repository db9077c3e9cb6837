"""What a step minimises: next-token cross-entropy per tier, and distillation from the top tier.

With a multi-token prediction module also, times lambda, the cross-entropy of the token after the
next (DeepSeek-V3, arXiv 2412.19437, section 2.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dvpa_train.batches import IGNORED

LOSS_CHUNK = 1024  # positions, where the recipe does not say; `dvpa.plan.search` takes as many
WHOLE_LOGITS = 1 << 26  # of a micro-batch; more are made in chunks: at the loss, 12 bytes for each

Head = Callable[[Tensor], Tensor]


def as_they_are(logits: Tensor) -> Tensor:
    """The head of what are logits already."""
    return logits


def in_chunks(
    terms: Callable[..., tuple[Tensor, ...]], columns: Sequence[Tensor], size: int
) -> tuple[Tensor, ...]:
    """`terms(*columns)`, `size` positions at a time: what it makes of them is not kept.

    Each chunk is computed again in the backward pass, so that only one chunk's logits are alive.

    Args:
        terms: of columns [M, ...] a tuple of columns [M], position by position.
        size: 0: all at once, and kept.
    """
    if not size:
        return terms(*columns)
    starts = range(0, max(len(columns[0]), 1), size)  # no position at all is a chunk, too
    parts = [
        checkpoint(
            terms,
            *(column[start : start + size] for column in columns),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in starts
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats; logits [N, vocab], targets int64 [N] -> fp32 [N]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`tau^2 KL(teacher || student)` per position, both softened by tau; the teacher is a constant.

    student, teacher: logits [N, vocab] -> fp32 [N] (Hinton et al., arXiv 1503.02531).
    """
    target = torch.log_softmax(teacher.detach().float() / temperature, -1)
    guess = torch.log_softmax(student.float() / temperature, -1)
    return temperature**2 * F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Scorer:
    """From what a head reads, position by position, to the terms of the loss.

    head, teacher_head: states [M, D] -> logits [M, vocab]; `as_they_are` for logits.
    """

    head: Head = as_they_are
    teacher_head: Head = as_they_are
    temperature: float = 1.0

    def single(self, states: Tensor, targets: Tensor) -> tuple[Tensor]:
        """(nll [M],)."""
        return (token_nll(self.head(states), targets),)

    def pair(
        self, top: Tensor, lower: Tensor, targets: Tensor, taught: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(nll at the top, nll lower, KL of the lower, with `taught` also of the top), each [M].

        `taught`: what the teacher's head reads; None: the top is the teacher.
        """
        top_logits, logits = self.head(top), self.head(lower)
        with torch.no_grad():
            teacher = top_logits if taught is None else self.teacher_head(taught)
        terms = [token_nll(top_logits, targets), token_nll(logits, targets)]
        for student in (logits,) if taught is None else (logits, top_logits):
            terms.append(distillation_kl(student, teacher, self.temperature))
        return tuple(terms)

    def guess(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(nll [M], bool [M]: the best guess is right)."""
        logits = self.head(states)
        return token_nll(logits, targets), logits.detach().argmax(-1) == targets


@dataclass(frozen=True)
class StepSums:
    """What a step reports, as sums that add up over micro-batches and processes.

    `values` fp64 [4 * tiers + 6]: per tier the summed nll, its count, the tokens run and those the
    multi-token prediction module ran; then distillation and its count; that module's nll, right
    guesses and count; the loss.
    """

    values: Tensor

    @classmethod
    def zeros(cls, num_tiers: int, device: torch.device) -> "StepSums":
        """Nothing yet."""
        return cls(torch.zeros(4 * num_tiers + 6, dtype=torch.float64, device=device))

    def __add__(self, other: "StepSums") -> "StepSums":
        return StepSums(self.values + other.values)

    @torch.no_grad()
    def add(self, loss: Tensor, nll: Tensor, tiers: Tensor, run: Tensor) -> None:
        """Loss, nll [N] with its tiers [N], and the tiers of all tokens that were run."""
        self._count(0, tiers, nll.double())
        self._count(1, tiers)
        self._count(2, run)
        self.add_loss(loss)

    @torch.no_grad()
    def add_loss(self, loss: Tensor) -> None:
        """A part of the loss."""
        self.values[-1] += loss

    @torch.no_grad()
    def add_distillation(self, kl: Tensor) -> None:
        """KL of every position."""
        self.values[-6] += kl.double().sum()
        self.values[-5] += kl.numel()

    @torch.no_grad()
    def add_mtp(self, nll: Tensor, right: Tensor) -> None:
        """Multi-token prediction: nll and right guesses of every scored position."""
        self.values[-4] += nll.double().sum()
        self.values[-3] += right.sum()
        self.values[-2] += nll.numel()

    @torch.no_grad()
    def add_mtp_run(self, tiers: Tensor) -> None:
        """Tiers of all positions the module has run; negative: padding."""
        self._count(3, tiers[tiers >= 0])

    def _count(self, column: int, tiers: Tensor, weights: Tensor | None = None) -> None:
        size = self._num_tiers
        counted = torch.bincount(tiers, weights, minlength=size)
        self.values[column * size : (column + 1) * size] += counted.to(self.values)

    @property
    def _num_tiers(self) -> int:
        return (len(self.values) - 6) // 4

    @property
    def tokens(self) -> list[float]:
        """Tokens run per tier."""
        return self._column(2)

    @property
    def mtp_tokens(self) -> list[float]:
        """Positions the multi-token prediction module has run, per tier."""
        return self._column(3)

    def _column(self, column: int) -> list[float]:
        size = self._num_tiers
        found: list[float] = self.values[column * size : (column + 1) * size].tolist()
        return found

    def means(self) -> dict[str, float]:
        """`loss`, `nll/tier_T` of the tiers that had tokens, `distillation`, `mtp_loss`, ..."""
        found = {"loss": float(self.values[-1])}
        for tier, (total, count) in enumerate(zip(self._column(0), self._column(1), strict=True)):
            if count:
                found[f"nll/tier_{tier}"] = total / count
        kl, kl_count, mtp, right, mtp_count = self.values[-6:-1].tolist()
        if kl_count:
            found["distillation"] = kl / kl_count
        if mtp_count:
            found |= {"mtp_loss": mtp / mtp_count, "mtp_accuracy": right / mtp_count}
        return found


@dataclass(frozen=True)
class MtpSchedule:
    """Lambda, the weight of multi-token prediction: `early` for two thirds of a run, then `late`.

    DeepSeek-V3 (arXiv 2412.19437, section 4.2): 0.3 for 10 of 14.8 trillion tokens, then 0.1.
    `first_step` is the stage's place among the run's `total_steps`. 0: the module does not run.
    """

    early: float = 0.0
    late: float = 0.0
    first_step: int = 0
    total_steps: int = 1

    def weight(self, step: int) -> float:
        """Lambda at a step of the stage, from 0."""
        return self.early if 3 * (self.first_step + step) < 2 * self.total_steps else self.late


def mtp_targets(labels: Tensor, starts: Tensor | None = None) -> Tensor:
    """Targets of the multi-token prediction module: at position i, what i + 1 has to predict.

    Args:
        labels: int64 [N, S], shifted (position i: token i + 1), `IGNORED` where not scored.
        starts: bool [N, S], True on the first token of a packed document; where the next token is
            one, the module would join two documents, so that position is not scored.

    Returns:
        int64 [N, S - 1].
    """
    targets = labels[:, 1:]
    return targets if starts is None else targets.masked_fill(starts[:, 1:], IGNORED)
