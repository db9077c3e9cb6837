"""The same linear merge by dvpa and by mergekit, if that is there.

DVPA_MERGEKIT: mergekit-yaml of an environment of its own (default: the one on the path).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from assembly_world import formula, load, write_recipe
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dvpa.checkpoint.assemble import assemble

PROGRAM = os.environ.get("DVPA_MERGEKIT") or shutil.which("mergekit-yaml")
EXPERTS = 4


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random Qwen3-MoE models, saved with one tensor per expert."""
    root = tmp_path_factory.mktemp("parents")
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(root / name)
    return {name: root / name for name in "ab"}


def unpacked(merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """mergekit's packed experts as one tensor each."""
    tensors = {}
    for name, tensor in merged.items():
        prefix, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not prefix.endswith("experts"):
            tensors[name] = tensor
            continue
        for expert in range(EXPERTS):
            parts = {"down_proj": tensor[expert]}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), tensor[expert].chunk(2), strict=True))
            tensors |= {f"{prefix}.{expert}.{part}.weight": value for part, value in parts.items()}
    return tensors


@pytest.mark.slow
@pytest.mark.skipif(
    PROGRAM is None, reason="no mergekit-yaml: put mergekit 0.1.5 on the path or set DVPA_MERGEKIT"
)
def test_mergekit_gives_the_same_within_a_unit_in_the_last_place(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    rules = [{"match": "all", "lambda": {"a": 0.6, "b": 0.4}}]
    assemble(write_recipe(tmp_path / "r.yaml", parents, rules), tmp_path / "out")
    models = [
        {"model": str(parents[name]), "parameters": {"weight": share}}
        for name, share in (("a", 0.6), ("b", 0.4))
    ]
    data = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(data))
    command = [str(PROGRAM), str(tmp_path / "m.yaml"), str(tmp_path / "peer"), "--lazy-unpickle"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--no-copy-tokenizer", "--quiet"],
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours, peer = load(tmp_path / "out"), unpacked(load(tmp_path / "peer"))
    left, right = (load(folder) for folder in parents.values())
    assert peer.keys() == ours.keys()
    differing = 0
    for name, tensor in ours.items():
        assert tensor.equal(formula([0.6, 0.4], [left[name], right[name]])), name
        steps = (ordered(tensor) - ordered(peer[name])).abs()
        # Where the terms cancel, a rounding of theirs in fp32 is many units of what is left.
        terms = 0.6 * left[name].float().abs() + 0.4 * right[name].float().abs()
        is_rounding = (tensor.float() - peer[name].float()).abs() <= 2**-22 * terms
        assert bool(((steps <= 1) | is_rounding).all()), name
        differing += int((steps > 0).sum())
    assert differing < 1e-3 * sum(tensor.numel() for tensor in ours.values())


def ordered(tensor: Tensor) -> Tensor:
    """bf16 as whole numbers that count its values in order."""
    raw = tensor.contiguous().view(torch.int16).int()
    return torch.where(raw < 0, -(raw & 0x7FFF), raw)
