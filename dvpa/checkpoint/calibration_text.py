"""The text that experts are measured on, as token ids."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dvpa.tasks.records import read_text

SEQUENCE_LENGTH = 512
HELD_OUT = 4  # every fourth sequence is for the tiers' losses, the others measure experts


@dataclass(frozen=True)
class CalibrationText:
    """Token ids int64 [N, L], N at least 2, and where they come from."""

    ids: Tensor
    origin: str

    def digest(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    @property
    def measuring(self) -> Tensor:
        """The sequences that experts are measured on."""
        return self.ids[torch.arange(len(self.ids)) % HELD_OUT != 1]

    @property
    def held_out(self) -> Tensor:
        """The others."""
        return self.ids[torch.arange(len(self.ids)) % HELD_OUT == 1]


def read_calibration(
    checkpoint: Path, files: Sequence[Path | str], num_tokens: int, length: int = SEQUENCE_LENGTH
) -> CalibrationText:
    """The first `num_tokens` tokens of UTF-8 files (none: Python's own library), in sequences.

    Spread over the whole text: of `N` sequences each takes the beginning of its own N-th part.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8, or too little text; a checkpoint
            without a tokenizer.
    """
    if not (checkpoint / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{checkpoint}: no tokenizer there (tokenizer_config.json), so no text can be read; "
            "keep the experts' order instead"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    named = [Path(file) for file in files]
    documents = [read_text(path) for path in named] if named else list(_library())
    text = "\n".join(documents)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    origin = (
        ", ".join(path.name for path in named)
        or f"the library of Python {platform.python_version()}"
    )
    count = max(2, num_tokens // length)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = []
    for part in _parts(text, count):
        wanted = length - len(begin)
        tokens = tokenizer(part[: wanted * 16], add_special_tokens=False)["input_ids"][:wanted]
        if len(tokens) < wanted:
            raise ValueError(
                f"calibration text: {origin} has too few tokens for {count} sequences of {length}; "
                "ask for fewer tokens or give more text"
            )
        ids.append([*begin, *tokens])
    return CalibrationText(torch.tensor(ids), f"{origin} (sha256 {digest})")


def _parts(text: str, count: int) -> Iterable[str]:
    size = len(text) // count
    return (text[i * size : (i + 1) * size] for i in range(count))


def _library() -> Iterable[str]:
    """The sources of the standard library's modules, in order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return (path.read_text(encoding="utf-8", errors="replace") for path in paths)
