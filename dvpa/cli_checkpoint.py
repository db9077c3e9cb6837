"""How the `dvpa` commands read checkpoints: checked early, quietly, with errors that name them."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvpa.engine import Engine


def require_checkpoint(checkpoint: Path) -> None:
    """Check before anything heavy is imported that `checkpoint` is a dvpa checkpoint folder."""
    config = checkpoint / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{checkpoint}: not a checkpoint folder (no config.json there)")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config}: not valid JSON: {error}") from None
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if model_type != "dvpa":
        raise ValueError(f"{config}: model_type: {model_type!r} must be 'dvpa'")


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Name the checkpoint in whatever a damaged one makes the libraries raise."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(f"{checkpoint}: the checkpoint cannot be read: {error}") from error
    except (ValueError, OSError) as error:
        names_a_file = isinstance(error, OSError) and error.filename is not None
        if names_a_file or str(checkpoint) in str(error):
            raise
        raise ValueError(f"{checkpoint}: {error}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from Transformers between us and the one clear line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def open_engine(arguments: argparse.Namespace, concurrency: int, **options: Any) -> "Engine":
    """The engine that many requests at a time are put to, with --threads and --dtype."""
    with quiet_transformers(), reading(arguments.checkpoint):
        import torch

        from dvpa.engine import Engine

        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        return Engine(
            arguments.checkpoint,
            dtype=arguments.dtype,
            max_num_seqs=concurrency,
            max_num_batched_tokens=max(512, concurrency),
            **options,
        )
