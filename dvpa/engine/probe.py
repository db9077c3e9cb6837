"""The difficulty head over a prompt that arrives in chunks, or of which pages are known already.

The head pools the prompt's states with a learned query (a softmax over positions). That is kept as
a running sum, so no state has to stay; a copy of it at the end of each page is what lets a request
with a known prefix be scored without reading the prefix again.

Letters: N new positions, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Continue a reading with new states; one Reading for each of `ends` (1 .. N, increasing)."""
    states_ND, scores_N = head.look(states_ND)
    peak = scores_N.amax()
    if before is not None:
        peak = torch.maximum(peak, before.peak)
    weights_N = (scores_N - peak).exp()
    totals_N = weights_N.cumsum(0)
    pooled_ND = (weights_N[:, None] * states_ND.float()).cumsum(0)
    if before is not None:
        rescale = (before.peak - peak).exp()
        totals_N = totals_N + before.total * rescale
        pooled_ND = pooled_ND + before.pooled * rescale
    return [
        Reading(peak, totals_N[end - 1], pooled_ND[end - 1].clone(), states_ND[end - 1].clone())
        for end in ends
    ]


def difficulty(head: DifficultyHead, reading: Reading, logits_V: Tensor) -> float:
    """The head's score of the prompt read; NaN if its states were not finite."""
    pooled = (reading.pooled / reading.total).to(reading.last.dtype)
    return float(head.judge(pooled[None], reading.last[None], logits_V[None]).difficulty)
