"""The difficulty head over a prompt that arrives in chunks, or of which pages are known already.

The head pools the prompt's states with a learned query (a softmax over positions). That is kept as
a running sum, so no state has to stay; a copy of it at the end of each page is what lets a request
with a known prefix be scored without reading the prefix again.

Letters: N new positions, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dvpa.model.difficulty import DifficultyHead


@dataclass(frozen=True)
class Reading:
    """Softmax-weighted sum of the states read: `pooled` / `total`, at scale exp(`peak`); fp32."""

    peak: Tensor
    total: Tensor
    pooled: Tensor  # [D]
    last: Tensor  # [D], the last state read, normalised


def read_on(
    head: DifficultyHead, before: Reading | None, states_ND: Tensor, ends: Sequence[int]
) -> list[Reading]:
    """Continue a reading with new states; one Reading for each of `ends` (1 .. N, rising)."""
    states_ND, scores_N = head.look(states_ND)
    readings: list[Reading] = []
    for start, end in pairwise((0, *ends)):
        # Each at the scale of its own peak: what comes later may outweigh it beyond fp32.
        if before is None or start < end:
            before = _merge(before, states_ND[start:end], scores_N[start:end])
        readings.append(before)
    return readings


def _merge(before: Reading | None, states_ND: Tensor, scores_N: Tensor) -> Reading:
    peak = scores_N.amax()
    if before is not None:
        peak = torch.maximum(peak, before.peak)
    weights_N = (scores_N - peak).exp()
    total, pooled = weights_N.sum(), weights_N @ states_ND.float()
    if before is not None:
        rescale = (before.peak - peak).exp()
        total, pooled = total + before.total * rescale, pooled + before.pooled * rescale
    return Reading(peak, total, pooled, states_ND[-1].clone())


def difficulty(head: DifficultyHead, reading: Reading, logits_V: Tensor) -> float:
    """The head's score of the prompt read; NaN if its states were not finite."""
    pooled = (reading.pooled / reading.total).to(reading.last.dtype)
    return float(head.judge(pooled[None], reading.last[None], logits_V[None]).difficulty)
