"""The checkpoint that fine-tuning starts from: its config, weights, tokenizer and fingerprint."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dvpa.checkpoint.export import read_config
from dvpa.config import DvpaConfig, find_config
from dvpa.model import DvpaForCausalLM

SAMPLE_BYTES, NUM_SAMPLES = 1 << 16, 32
READ_WHOLE = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model")


def initial_config(
    checkpoint: str | Path, probe_layer: int | None, hidden_size: int | None
) -> DvpaConfig:
    """The config of a checkpoint folder; one without a difficulty head gets the one described.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a bad config, or a head is described although the checkpoint has one.
    """
    config = read_config(Path(checkpoint))
    if probe_layer is None or hidden_size is None:
        if probe_layer is not None or hidden_size is not None:
            raise ValueError("difficulty: give both probe_layer and hidden_size, or neither")
        return config
    if config.difficulty is not None:
        raise ValueError(
            f"difficulty.probe_layer: {checkpoint} has a head of its own; leave it out"
        )
    head = {"probe_layer": probe_layer, "hidden_size": hidden_size}
    described: DvpaConfig = DvpaConfig.from_dict({**config.to_dict(), "difficulty": head})
    return described


def load_initial(checkpoint: str | Path) -> DvpaForCausalLM:
    """The model in fp32, without its difficulty head: that learns last, from new outcomes.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is incomplete or corrupt.
    """
    model: DvpaForCausalLM = DvpaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.difficulty_head = None
    model.config.difficulty = None
    return model


def load_tokenizer(
    checkpoint: str | Path, vocab_size: int, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; without a padding token it pads with its end of sequence.

    Args:
        chat_template: a Jinja file (also below configs/) that replaces the tokenizer's own.

    Raises:
        FileNotFoundError: no tokenizer or no such template.
        ValueError: it has more tokens than the model, no end of sequence, or is not a fast one.
    """
    folder = Path(checkpoint)
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder}: the checkpoint has no tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}: "
            "it is another model's"
        )
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"{folder}: its tokenizer has no {name}, which the task format needs")
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: its tokenizer is not a fast one (no tokenizer.json)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return set_template(tokenizer, chat_template)


def set_template(tokenizer: Any, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Give the tokenizer the chat template of a file, if one is named."""
    if chat_template is not None:
        tokenizer.chat_template = find_config(chat_template).read_text(encoding="utf-8")
    return tokenizer  # type: ignore[no-any-return]


def fingerprint(checkpoint: str | Path) -> dict[str, str]:
    """File name -> SHA-256, of what a run depends on in the checkpoint it starts from.

    Config, index and tokenizer are read whole; of each shard its size and evenly spaced samples
    (all of a small one), so that a checkpoint of hundreds of gigabytes takes no minutes.
    """
    folder = Path(checkpoint)
    files = {}
    for name in READ_WHOLE:
        if (folder / name).is_file():
            files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for path in sorted(folder.glob("*.safetensors")):
        files[path.name] = _sampled(path)
    return files


def changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Files of the starting checkpoint that differ between two claims on the same recipe."""
    old, new = before.get("initial_checkpoint", {}), now.get("initial_checkpoint", {})
    if before["recipe"] != now["recipe"]:
        return []
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(min(start, max(0, size - SAMPLE_BYTES)))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
