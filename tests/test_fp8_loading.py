"""`from_pretrained` of an FP8 checkpoint: the weights that the format says, in whatever dtype."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_world import (
    KV,
    MISFITS,
    QUANTIZATION,
    SCALE,
    edit_config,
    make_fp8_source,
    rewrite,
    same,
    store,
)
from source_world import logits_of, read_folder, text, unseen
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
)

from dvpa.checkpoint import convert_checkpoint
from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM, DvpaModel, DvpaPreTrainedModel, fp8_loading
from dvpa_train.initial import load_initial

PLAIN = {"quantization_config": None, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours in FP8, beside its source; never written to."""
    source = make_fp8_source(tmp_path_factory.mktemp("fp8") / "source")
    convert_checkpoint(source, source.parent / "dvpa", text(), pool="prefix", shard_bytes=200_000)
    return source.parent / "dvpa"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    (tmp_path / "dvpa").mkdir()
    for path in folder.iterdir():
        (tmp_path / "dvpa" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "dvpa"


def saved(model: Any, out: Path) -> dict[str, Tensor]:
    """The weights of a model, by the names of a checkpoint."""
    model.save_pretrained(out)
    return read_folder(out)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
def test_every_weight_is_what_the_format_says(
    dtype: torch.dtype | None, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {} if dtype is None else {"dtype": dtype}
    stored = read_folder(folder)
    count = sum(name.endswith(SCALE) for name in stored)
    model = DvpaForCausalLM.from_pretrained(folder, **given)
    wanted = dtype or torch.bfloat16
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dvpa")]
    assert said == [f"{folder}: {count} weights dequantised from FP8 to {str(wanted)[6:]}"]
    ours = saved(model, tmp_path / "out")
    assert not any(name.endswith(SCALE) for name in ours)
    for name, tensor in exact(stored).items():
        kept = torch.float32 if name.endswith("tier_bias") else wanted
        assert same(ours[name], tensor.to(kept)), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == str(wanted)[6:]
    caplog.clear()
    again = DvpaForCausalLM.from_pretrained(tmp_path / "out")
    assert not [record for record in caplog.records if record.name.startswith("dvpa")]
    assert torch.equal(logits_of(again, unseen()), logits_of(model, unseen()))


def exact(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight in fp32: codes times the scale of every element."""
    weights = {name: t.float() for name, t in stored.items() if not name.endswith(SCALE)}
    for name in weights:
        if name + SCALE in stored:
            rows, columns = (torch.arange(size) // 128 for size in weights[name].shape)
            weights[name] *= stored[name + SCALE][rows][:, columns]
    return weights


def test_the_top_tier_is_the_source(folder: Path, tmp_path: Path) -> None:
    """Against Transformers' DeepSeek-V3 with the weights that were dequantised by hand."""
    source = folder.parent / "source"
    state = exact(read_folder(source))
    store(tmp_path / "plain", state, json.loads((source / "config.json").read_text()) | PLAIN)
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain").eval()
    expected = logits_of(reference, unseen())
    for auto in (AutoModelForCausalLM, DvpaForCausalLM):
        model = auto.from_pretrained(folder, dtype=torch.float32)
        difference = (logits_of(model, unseen(), tiers="top") - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max()


def test_the_decoder_alone(folder: Path) -> None:
    whole = DvpaForCausalLM.from_pretrained(folder)
    for load in (AutoModel, DvpaModel):
        model = load.from_pretrained(folder)
        expected = whole.model.state_dict()
        assert all(same(value, expected[name]) for name, value in model.state_dict().items())


def test_a_config_that_was_read_before(folder: Path) -> None:
    config = DvpaConfig.from_pretrained(folder)
    assert config.has_fp8_weights
    model = DvpaForCausalLM.from_pretrained(folder, config=config)
    assert config.has_fp8_weights
    assert not model.config.has_fp8_weights
    assert not {"has_fp8_weights", "quantization_config"} & config.to_dict().keys()


def test_training_starts_from_the_same_numbers(folder: Path) -> None:
    expected = DvpaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    initial = load_initial(folder).state_dict()
    assert initial.keys() == expected.keys()
    assert all(same(value, expected[name]) for name, value in initial.items())


def test_zero_3_gets_whole_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = DvpaForCausalLM.from_pretrained(folder).state_dict()
    monkeypatch.setattr(fp8_loading, "is_deepspeed_zero3_enabled", lambda: True)
    model = DvpaForCausalLM.from_pretrained(folder)
    assert all(same(value, expected[name]) for name, value in model.state_dict().items())


PROGRAM = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dvpa", "dvpa_kernels", "dvpa_train"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
expected = torch.load(sys.argv[2])
assert model.state_dict().keys() == expected.keys()
assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
model.save_pretrained(sys.argv[3])
"""


def test_a_process_without_dvpa(folder: Path, tmp_path: Path) -> None:
    torch.save(DvpaForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "expected.pt")
    arguments = [str(folder), str(tmp_path / "expected.pt"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert "weights dequantised from FP8 to bfloat16" in done.stderr
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(folder: Path) -> None:
    expected = DvpaForCausalLM.from_pretrained(folder).state_dict()
    model = DvpaForCausalLM.from_pretrained(folder, device_map="cuda")
    for name, value in model.state_dict().items():
        assert value.is_cuda
        assert same(value.cpu(), expected[name])


DAMAGE: dict[str, tuple[Any, str]] = {
    **MISFITS,
    "no codes": (lambda t: t.pop(KV), rf"{KV}"),
    "codes of another shape": (
        lambda t: t.update({KV: t[KV][:512].clone(), KV + SCALE: torch.ones(4, 2)}),
        rf"{KV}: shape \(512, 160\)",
    ),
    "scales of nothing": (
        lambda t: t.update({f"lm_head.weight{SCALE}": torch.ones(1, 2)}),
        f"lm_head.weight{SCALE}",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_what_does_not_fit_is_named(kind: str, copy: Path) -> None:
    change, message = DAMAGE[kind]
    rewrite(copy, change)
    with pytest.raises(ValueError, match=message):
        DvpaForCausalLM.from_pretrained(copy)


def test_undeclared_or_unknown_fp8(copy: Path) -> None:
    edit_config(copy, quantization_config=None)
    with pytest.raises(ValueError, match=r"weight: FP8, but config\.json says nothing of it"):
        DvpaForCausalLM.from_pretrained(copy)
    with pytest.raises(ValueError, match=r"weight: FP8, but config\.json says nothing of it"):
        DvpaModel.from_pretrained(copy)
    edit_config(copy, quantization_config={**QUANTIZATION, "weight_block_size": [64, 64]})
    with pytest.raises(ValueError, match=r"weight_block_size: \[64, 64\] must be \[128, 128\]"):
        DvpaForCausalLM.from_pretrained(copy)


def test_a_truncated_shard(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=path.name):
        DvpaForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("load", [DvpaForCausalLM, DvpaModel])
def test_a_transformers_that_loads_otherwise_is_noticed(
    load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(DvpaPreTrainedModel, "_load_pretrained_model")
    with pytest.raises(ValueError, match="took FP8 codes for weights"):
        load.from_pretrained(folder)


def test_what_would_take_codes_for_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    config, state = DvpaConfig.from_pretrained(folder), read_folder(folder)
    with pytest.raises(
        ValueError, match=r"state_dict: model\.layers.*float8_e4m3fn; load its fold"
    ):
        DvpaModel.from_pretrained(None, config=config, state_dict=state)
    plain = exact(state)
    model = DvpaModel.from_pretrained(None, config=config, state_dict=plain, dtype=torch.float32)
    assert same(model.layers[1].self_attn.kv_a_proj_with_mqa.weight.detach(), plain[KV])
    with pytest.raises(ValueError, match=r"quantization_config: .* is dequantised"):
        DvpaForCausalLM.from_pretrained(
            folder, quantization_config=FineGrainedFP8Config(dequantize=True)
        )
    with pytest.raises(ValueError, match="device_map: 'disk'"):
        DvpaForCausalLM.from_pretrained(
            folder,
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=str(tmp_path / "offload"),
        )
