"""The difficulty stage: the head learns from the checkpoint's own outcomes on unseen questions.

The backbone is frozen, so the states the head reads are computed once. Labels are each tier's
quality on held-out tasks; the loss is the ordinal likelihood
`sum_t BCE(P(tier t suffices), quality_t)`. The parameters of the best step on a held-back fifth of
the tasks are kept.
"""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.model.difficulty import last_position
from dvpa.tasks import TaskSet
from dvpa.tasks.encoding import encode_tasks, right_pad
from dvpa_train.config import DifficultyStage

CHECK_EVERY = 20
HELD_BACK = 0.2


def train_head(
    model: DvpaForCausalLM,
    tokenizer: Any,
    tasks: TaskSet,
    outcomes: OutcomeTable,
    stage: DifficultyStage,
    seed: int,
) -> dict[str, float]:
    """Fit `model.difficulty_head` in place: its loss before and after on the held-back tasks.

    Raises:
        ValueError: the model has no head, or `outcomes` are not those of `tasks`.
    """
    head = model.difficulty_head
    if head is None:
        raise ValueError("difficulty: the model config has no difficulty head to train")
    if outcomes.ids != [task.id for task in tasks]:
        raise ValueError("outcomes: must be those of the given tasks, in their order")
    states, mask, lens = _probe(model, tokenizer, tasks)
    quality = torch.tensor(outcomes.quality, dtype=torch.float32, device=states.device)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(quality)))
    held = order[: max(1, int(HELD_BACK * len(order)))]
    kept = order[len(held) :]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay
    )

    def loss(rows: Tensor, training: bool) -> Tensor:
        success = head.train(training)(states[rows], mask[rows], lens[rows]).success
        return F.binary_cross_entropy(success.clamp(1e-6, 1 - 1e-6), quality[rows])

    with torch.no_grad():
        first = best = float(loss(held, training=False))
    best_state = deepcopy(head.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the dropout
        for step in range(1, stage.steps + 1):
            rows = kept[torch.randint(len(kept), (stage.batch_size,), generator=generator)]
            optimizer.zero_grad()
            loss(rows, training=True).backward()
            optimizer.step()
            if step % CHECK_EVERY == 0:
                with torch.no_grad():
                    current = float(loss(held, training=False))
                if current < best:
                    best, best_state = current, deepcopy(head.state_dict())
    head.load_state_dict(best_state)
    head.eval()
    return {"loss_before": first, "loss": best}


@torch.no_grad()
def _probe(
    model: DvpaForCausalLM, tokenizer: Any, tasks: TaskSet, batch_size: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every prompt: states [N, S, D] at the probe layer, mask [N, S], logit lens [N, V]."""
    prompts = [prompt for prompt, _ in encode_tasks(tokenizer, list(tasks))]
    ids, mask = right_pad(prompts, tokenizer.pad_token_id)
    ids_t, mask_t = torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device)
    states = torch.cat(
        [
            model.probe_states(ids_t[i : i + batch_size], mask_t[i : i + batch_size])
            for i in range(0, len(ids), batch_size)
        ]
    )
    lens = model.lm_head(model.model.norm(last_position(states, mask_t.bool())))
    return states, mask_t.bool(), lens
