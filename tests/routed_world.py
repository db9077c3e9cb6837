"""A small trained model whose questions say by their first word which tiers can answer them.

easy: every tier. fair: all but the base tier. hard: the top tier alone. lost: nobody.
"""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dvpa.config import find_config, load_model_config
from dvpa.evaluate.outcomes import collect_outcomes
from dvpa.model import DvpaForCausalLM
from dvpa.tasks import Task, TaskSet, train_tokenizer
from dvpa.tasks.encoding import encode_tasks, right_pad
from dvpa_train.config import DifficultyStage
from dvpa_train.difficulty import train_head

KINDS = ("easy", "fair", "hard", "lost")
ANSWERS = {"easy": "yes", "fair": "no", "hard": "red"}
WRONG = "so"  # what a tier learns to say where it cannot know
CALM, SHIFTED = (0.5, 0.25, 0.1, 0.15), (0.1, 0.2, 0.6, 0.1)  # shares of the kinds
STEPS, RATE = 200, 6e-3  # with warm-up, decay and clipping every seed learns it


def questions(mix: tuple[float, ...], size: int, seed: int) -> list[Task]:
    """Distinct questions of a mix of kinds, in random order.

    Just as many of each as the mix says: what they cost is then not left to the draw.
    """
    draws, tasks = random.Random(seed), dict[str, Task]()
    ends = np.round(np.cumsum(mix) / np.sum(mix) * size).astype(int)
    for level, (kind, end) in enumerate(zip(KINDS, ends, strict=True)):
        while len(tasks) < end:
            words = "".join(draws.choices("abcdefghij", k=draws.randint(3, 7)))
            answer = ANSWERS.get(kind) or draws.choice("klmnop")
            task = Task.create(f"{kind} {words} ?", answer, level, kind)
            tasks[task.id] = task
    shuffled = list(tasks.values())
    draws.shuffle(shuffled)
    return shuffled


@cache
def routed_model() -> tuple[DvpaForCausalLM, object]:
    """Model, in eval mode, and tokenizer."""
    lines = [f"{t.question} {t.answer} {WRONG}" for t in questions((1, 1, 1, 1), 300, 99)]
    tokenizer = train_tokenizer(lines, 320)
    config = load_model_config(find_config("model/pico.yaml"))
    config.vocab_size = len(tokenizer)
    config.moe_intermediate_size = 64  # experts that matter in the price
    torch.manual_seed(0)
    model = DvpaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in range(STEPS):
        tier = step % 3
        tasks = questions((1, 1, 1, 1), 32, 1000 + step)
        shown = [
            Task.create(t.question, t.answer if t.level <= tier else WRONG, t.level, t.kind)
            for t in tasks
        ]
        loss = model(**_batch(tokenizer, shown), tiers=tier).loss
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1.0, (step + 1) / 30) * (1 - 0.9 * step / STEPS)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    tasks = questions((1, 1, 1, 1), 400, 7)
    outcomes = collect_outcomes(model, tokenizer, tasks)
    stage = DifficultyStage(items=400, steps=200, batch_size=64)
    train_head(model, tokenizer, TaskSet("head", tuple(tasks)), outcomes, stage, seed=0)
    return model, tokenizer


def write_checkpoint(folder: Path) -> Path:
    """The model and its tokenizer, without a fitted tier map."""
    model, tokenizer = routed_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def _batch(tokenizer: object, tasks: list[Task]) -> dict[str, torch.Tensor]:
    pairs = encode_tasks(tokenizer, tasks)
    ids, mask = right_pad([prompt + answer for prompt, answer in pairs], pad_id=0)
    labels = np.where(mask == 1, ids, -100)
    for row, (prompt, _) in enumerate(pairs):
        labels[row, : len(prompt)] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
