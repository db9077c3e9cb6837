"""A checkpoint, ready to run: model, tokenizer, and the store of its experts if need be.

A multi-token prediction module (`dvpa.model.mtp`) stays on the disk: nothing here runs it.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dvpa.checkpoint.export import read_config
from dvpa.config import DvpaConfig
from dvpa.engine.residency import ExpertStore, load_resident
from dvpa.model.causal_lm import DvpaForCausalLM
from dvpa.model.tensor_names import mtp_prefix, tensor_shapes

logger = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Loaded:
    """What the engine runs; `store` only where experts are not all resident.

    `skipped_tensors` of the checkpoint were not loaded: those of a multi-token prediction module.
    """

    model: DvpaForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    store: ExpertStore | None
    skipped_tensors: int = 0


def load_model(
    model: str | Path | DvpaForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    max_resident_bytes: int | None,
) -> Loaded:
    """Load a folder, or take a model as it is (moved to `device`, cast to `dtype` if given).

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a broken checkpoint, an unknown dtype, a bound on memory for a loaded model or
            one that is too small.
    """
    wanted = _dtype(dtype)
    if isinstance(model, DvpaForCausalLM):
        if max_resident_bytes is not None:
            raise ValueError("max_resident_bytes: needs a checkpoint folder, not a loaded model")
        return Loaded(model.to(device=device, dtype=wanted).eval(), tokenizer, None)
    folder = Path(model)
    for part in (folder, folder / "config.json"):
        if not part.exists():
            raise FileNotFoundError(f"{part}: no such checkpoint")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if tokenizer is None and (folder / "tokenizer_config.json").exists():
        # A special token spelt out in a prompt is text like any other.
        tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    config = read_config(folder)
    skipped = sum(name.startswith(mtp_prefix(config)) for name in tensor_shapes(config))
    if skipped:
        logger.info("%s: multi-token prediction is not used: %d tensors skipped", folder, skipped)
    if max_resident_bytes is not None:
        stored = config.dtype
        paged, store = load_resident(
            folder,
            dtype=wanted or (stored if isinstance(stored, torch.dtype) else torch.float32),
            max_resident_bytes=max_resident_bytes,
            device=device,
        )
        return Loaded(paged, tokenizer, store, skipped)
    loaded = _without_mtp(folder, config, wanted or "auto")
    return Loaded(loaded.to(device).eval(), tokenizer, None, skipped)


def _without_mtp(folder: Path, config: DvpaConfig, dtype: torch.dtype | str) -> DvpaForCausalLM:
    """The model, its multi-token prediction module, if it has one, left out."""
    if not config.num_nextn_predict_layers:
        return cast("DvpaForCausalLM", DvpaForCausalLM.from_pretrained(folder, dtype=dtype))
    # Transformers asks the class which tensors may be there in vain.
    body = {
        "__module__": DvpaForCausalLM.__module__,
        "_keys_to_ignore_on_load_unexpected": [f"^{re.escape(mtp_prefix(config))}"],
    }
    loader = cast("type[DvpaForCausalLM]", type("DvpaForCausalLM", (DvpaForCausalLM,), body))
    config.num_nextn_predict_layers = 0
    model = cast("DvpaForCausalLM", loader.from_pretrained(folder, config=config, dtype=dtype))
    model.__class__ = DvpaForCausalLM
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        return None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} must be 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
