"""What a step minimises: next-token cross-entropy per tier, and distillation from the top tier."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
class StepSums:
    """What a step reports, as sums that add up over micro-batches and processes.

    `values` fp64 [3 * tiers + 3]: per tier the summed nll, its count and the tokens run; then the
    summed distillation, its count, and the loss.
    """

    values: Tensor

    @classmethod
    def zeros(cls, num_tiers: int, device: torch.device) -> "StepSums":
        """Nothing yet."""
        return cls(torch.zeros(3 * num_tiers + 3, dtype=torch.float64, device=device))

    def __add__(self, other: "StepSums") -> "StepSums":
        return StepSums(self.values + other.values)

    @torch.no_grad()
    def add(self, loss: Tensor, nll: Tensor, tiers: Tensor, run: Tensor) -> None:
        """Loss, nll [N] with its tiers [N], and the tiers of all tokens that were run."""
        size = self._num_tiers
        for column, (where, weights) in enumerate(
            ((tiers, nll.double()), (tiers, None), (run, None))
        ):
            counted = torch.bincount(where, weights, minlength=size)
            self.values[column * size : (column + 1) * size] += counted.to(self.values)
        self.values[-1] += loss

    @torch.no_grad()
    def add_distillation(self, kl: Tensor) -> None:
        """KL of every position."""
        self.values[-3] += kl.double().sum()
        self.values[-2] += kl.numel()

    @property
    def _num_tiers(self) -> int:
        return (len(self.values) - 3) // 3

    @property
    def tokens(self) -> list[float]:
        """Tokens run per tier."""
        size = self._num_tiers
        return list(self.values[2 * size : 3 * size].tolist())

    def means(self) -> dict[str, float]:
        """`loss`, `nll/tier_T` of the tiers that had tokens, `distillation`."""
        values, size = self.values.tolist(), self._num_tiers
        found = {"loss": values[-1]}
        for tier in range(size):
            if values[size + tier]:
                found[f"nll/tier_{tier}"] = values[tier] / values[size + tier]
        if values[-2]:
            found["distillation"] = values[-3] / values[-2]
        return found
