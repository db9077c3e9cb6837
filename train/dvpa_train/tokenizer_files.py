"""A tokenizer as files: its identity, and taking a given one into a run.

`tokenizer.json` alone decides which ids a text becomes, so it alone is hashed: parsed, without the
run-time state that Transformers keeps in it (padding, truncation), keys sorted. Reformatting the
file, or another chat template beside it, changes nothing; one more token or merge does.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from dvpa.config import DvpaConfig

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_NOT_IDENTITY = ("padding", "truncation")
_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 (hex) of what the tokenizer in `folder` does to a text.

    Raises:
        FileNotFoundError: no tokenizer.json there.
        ValueError: it is not JSON.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {TOKENIZER_FILE} there (a fast tokenizer is needed)")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object")
    kept = {key: value for key, value in content.items() if key not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a tokenizer or checkpoint folder.

    Raises:
        FileNotFoundError: tokenizer.json or tokenizer_config.json is missing.
        ValueError: they cannot be read.
    """
    from transformers import AutoTokenizer

    for name in (TOKENIZER_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name} there")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{folder}: the tokenizer cannot be read: {error}") from error


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy a tokenizer's files, byte for byte, and none of a checkpoint's weights.

    Raises:
        FileNotFoundError: tokenizer.json or tokenizer_config.json is missing.
    """
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"tokenizer: {folder}: no {name} there")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for pattern in _FILES:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                shutil.copy2(path, out / path.name)


def check_tokenizer(tokenizer: Any, config: DvpaConfig, name: str) -> None:
    """Refuse a given tokenizer that does not fit the model.

    Raises:
        ValueError: more tokens than the model has rows, or other special tokens than the model's.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer: {name}: {len(tokenizer)} tokens; must be at most the model's vocab_size "
            f"= {config.vocab_size}"
        )
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, expected = getattr(tokenizer, special), getattr(config, special)
        if ours != expected:
            raise ValueError(
                f"tokenizer: {name}: {special} is {ours}; the model config says {expected}"
            )
