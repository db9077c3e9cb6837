"""A small checkpoint, conversations and a recipe to fine-tune with, for tests."""

import json
from pathlib import Path

import torch
from rich.console import Console
from test_chat import PLAIN

from dvpa.config import load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.tasks import train_tokenizer
from dvpa_train.config import Recipe, load_recipe
from dvpa_train.main import TrainedRun, run_recipe

RECIPE = "train/finetune.yaml"
FEW = [
    "stages.joint.num_tiers=3", "stages.joint.tier_weights=[0.6, 0.4, 0.0]",
    "stages.joint.steps=6", "stages.joint.warmup_steps=1", "checkpoint_every=3",
    "optimizer.learning_rate=0.01",
    "difficulty={items: 40, steps: 20, batch_size: 16}",
    'calibration={budget: "90%", items: 40}',
]  # fmt: skip


def random_start(folder: Path) -> Path:
    """A random pico checkpoint whose experts matter, with a tokenizer and its chat template."""
    config = load_model_config("model/pico.yaml")
    config.initializer_range = 0.3
    torch.manual_seed(0)
    model = DvpaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(folder)
    lines = [f"what is {i} plus {i + 1} ? user: assistant: sum" for i in range(50)]
    tokenizer = train_tokenizer(lines, 310)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


def conversations(path: Path) -> Path:
    """Four hundred conversations of one or two questions, every twentieth far too long."""
    rows = []
    for i in range(400):
        messages = []
        for k in range(1 + i % 2):
            question = f"what is {i} plus {k + 1} ?" + " please" * (100 * (i % 20 == 0))
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": str(i + k + 1)},
            ]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows))
    return path


def recipe_for(start: Path, chats: Path, *overrides: str) -> Recipe:
    """The shipped recipe, cut down, from `start` on `chats`."""
    return load_recipe(RECIPE, [*cut_down(start, chats), *overrides])


def cut_down(start: Path, chats: Path) -> list[str]:
    """What makes the shipped recipe start from `start` and end in seconds."""
    return [
        f"initial_checkpoint={start}", f"data.files=[{{path: {chats}, format: chat}}]",
        "data.chat_template=null", "data.validation_fraction=0.5", *FEW,
    ]  # fmt: skip


def run(recipe: Recipe, out: Path) -> TrainedRun:
    """All of it."""
    trained = run_recipe(recipe, out, Console(quiet=True))
    assert trained is not None
    return trained
