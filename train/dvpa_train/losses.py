"""What a step minimises: next-token cross-entropy per tier, and distillation from the top tier."""

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
