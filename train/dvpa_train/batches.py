"""From examples to the rows of one step: padding, targets, and which tier every token runs at.

A step's tiers depend on (seed, stage, step) only, so that a resumed run draws what the
uninterrupted one would have, and any number of processes what one would have: each takes its `Part`
of the same draws.

Letters: N rows, S positions, B examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvpa.model.router import NO_TIER
from dvpa.tasks.encoding import right_pad
from dvpa_train.config import StageConfig
from dvpa_train.packed import IGNORED, PackedRow

# Ids of prompt and completion, with a conversation's learned tokens marked; or a packed window.
Example = tuple[list[int], list[int]] | tuple[list[int], list[int], list[bool]] | PackedRow


@dataclass(frozen=True)
class Part:
    """The `index`-th of `count` equal parts of a step's batch: a process's micro-batch."""

    index: int = 0
    count: int = 1


WHOLE_STEP = Part()


@dataclass(frozen=True)
class Rows:
    """`input_ids`, `labels` (shifted; -100 ignored), `tiers` (none on padding): int64 [N, S].

    Rows are padded on the right, where causal attention never looks, so no mask is needed; rows of
    several documents have `position_ids` int64 [N, S], from which the model masks one from another.

    With distillation the first half of the rows are the examples at the top tier, the second half
    the same examples lower; `paired` says so.
    """

    input_ids: Tensor
    labels: Tensor
    tiers: Tensor
    paired: bool
    position_ids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens of the step."""
        return int((self.tiers != NO_TIER).sum())


def collate(examples: Sequence[Example], pad_id: int, prompt_loss: bool) -> dict[str, Tensor]:
    """Right-padded inputs and next-token labels of B examples; packed rows bring their own.

    A conversation's user turns are prompt wherever they stand.
    """
    packed = [example for example in examples if isinstance(example, PackedRow)]
    if packed:
        return _collate_packed(packed, pad_id)
    ids, mask = right_pad([[*example[0], *example[1]] for example in examples], pad_id)
    labels = np.full_like(ids, IGNORED)
    labels[:, :-1] = np.where(mask[:, 1:] == 1, ids[:, 1:], IGNORED)
    if not prompt_loss:
        for row, (prompt, completion, *learned) in enumerate(examples):
            labels[row, : len(prompt) - 1] = IGNORED
            if learned:
                answers = labels[row, len(prompt) - 1 :][: len(completion)]
                answers[~np.array(*learned)] = IGNORED
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def _collate_packed(rows: Sequence[PackedRow], pad_id: int) -> dict[str, Tensor]:
    """Padding, behind a folder's last tokens, has position 0 throughout: a document a token."""
    ids, mask = right_pad([row.input_ids for row in rows], pad_id)
    labels, _ = right_pad([row.labels for row in rows], IGNORED)
    positions, _ = right_pad([row.position_ids for row in rows], 0)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def collate_step(
    item: tuple[Sequence[Example], Sequence[Example]], pad_id: int, prompt_loss: bool
) -> dict[str, Tensor]:
    """`collate` of a micro-batch; `scored` [2] counts the labels of the item's second part.

    All of them, and those that a prediction two tokens ahead has, too. What `BatchDataset` gives
    with a step's first micro-batch is all that this process has in the step.
    """
    micro, of_step = item
    batch = collate(micro, pad_id, prompt_loss)
    everything = batch if len(micro) == len(of_step) else collate(of_step, pad_id, prompt_loss)
    has_label = everything["labels"] != IGNORED
    has_next = has_label[:, 1:]
    if "position_ids" in everything:  # not across the start of a packed document
        has_next = has_next & (everything["position_ids"][:, 1:] != 0)
    return {**batch, "scored": torch.stack((has_label.sum(), has_next.sum()))}


def assign_tiers(
    batch: dict[str, Tensor], stage: StageConfig, seed: int, step: int, part: Part = WHOLE_STEP
) -> Rows:
    """Give every token of a part of the step its tier.

    Without distillation each example runs once, at a tier drawn by `tier_weights`. With it, each
    runs at the top tier and at a lower one; `switch_fraction` of the lower rows change between two
    tiers at a random position, so that every tier learns to read keys and values written by
    another.
    """
    draws = np.random.default_rng((seed, stage_key(stage), step))
    rows, length = batch["input_ids"].shape
    count = rows * part.count  # drawn for the whole step
    own = slice(rows * part.index, rows * (part.index + 1))
    weights = np.asarray(stage.tier_weights or [1.0] * stage.num_tiers, dtype=float)
    top = stage.num_tiers - 1
    if not stage.distillation or top == 0:
        row_tiers = draws.choice(stage.num_tiers, size=count, p=weights / weights.sum())[own]
        tiers = np.repeat(row_tiers[:, None], length, axis=1)
        return _rows(batch, tiers, paired=False)
    lower = weights[:-1] / weights[:-1].sum()
    low_tiers = np.repeat(draws.choice(top, size=count, p=lower)[own][:, None], length, axis=1)
    if stage.switch_fraction:
        switched = (draws.random(count) < stage.switch_fraction)[own]
        before = draws.integers(0, stage.num_tiers, count)[own]
        real = batch["attention_mask"].sum(1).numpy()
        position = (draws.random(count)[own] * real).astype(int)
        early = np.arange(length) < position[:, None]
        low_tiers = np.where(switched[:, None] & early, before[:, None], low_tiers)
    tiers = np.concatenate((np.full((rows, length), top), low_tiers))
    doubled = {name: torch.cat((tensor, tensor)) for name, tensor in batch.items()}
    return _rows(doubled, tiers, paired=True)


def stage_key(stage: StageConfig) -> int:
    """A stable number for a stage's name."""
    return int.from_bytes(stage.name.encode()[:8].ljust(8, b"\0"), "little")


def _rows(batch: dict[str, Tensor], tiers: Any, paired: bool) -> Rows:
    spread = torch.from_numpy(np.ascontiguousarray(tiers, dtype=np.int64))
    spread = spread.masked_fill(batch["attention_mask"] == 0, NO_TIER)
    return Rows(batch["input_ids"], batch["labels"], spread, paired, batch.get("position_ids"))
