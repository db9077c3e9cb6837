"""A pico model that answers some sums rightly and some not, for the tests of outcomes."""

from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import torch

from dvpa.config import find_config, load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.tasks.encoding import encode_task, right_pad
from dvpa.tasks.task_set import Task
from dvpa.tasks.tokenizer import train_tokenizer

LINES = [f"{a}+{b}={a + b}" for a in range(12) for b in range(8)] + ["reverse abc cba"] * 20


def task(question: str, answer: str, level: int = 0) -> Task:
    """A sum."""
    return Task.create(question, answer, level, "sum")


TASKS = [task(f"{a}+{b}=", str(a + b), level=int(a + b > 9)) for a in range(12) for b in range(4)]


@cache
def sum_tokenizer() -> Any:
    """Trained on sums."""
    return train_tokenizer(LINES, vocab_size=300)


def sum_model() -> DvpaForCausalLM:
    """Pico, briefly overfitted on half the tasks; a copy: an engine changes its tier map."""
    return deepcopy(_trained())


@cache
def _trained() -> DvpaForCausalLM:
    tokenizer = sum_tokenizer()
    torch.manual_seed(1)
    model = DvpaForCausalLM(load_model_config(find_config("model/pico.yaml")))
    pairs = [encode_task(tokenizer, t.question, t.answer) for t in TASKS[::2]]
    ids, mask = right_pad([prompt + answer for prompt, answer in pairs], pad_id=0)
    labels = np.where(mask == 1, ids, -100)
    for row, (prompt, _) in enumerate(pairs):
        labels[row, : len(prompt)] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(120):
        loss = model(**inputs, tiers=(2, 0, 1)[step % 3]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
