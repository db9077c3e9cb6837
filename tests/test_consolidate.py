"""The streamed export against Transformers' `save_pretrained`."""

from pathlib import Path

import pytest
import torch
from helpers import mtp_model, tiny_config, tiny_model
from safetensors.torch import load_file

from dvpa.model import DvpaForCausalLM
from dvpa_train.consolidate import write_model
from dvpa_train.processes import Processes


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny_model(), id="plain"),
        pytest.param(lambda: tiny_model(tiny_config(tie_word_embeddings=True)), id="tied"),
        pytest.param(lambda: mtp_model(), id="mtp"),
        pytest.param(lambda: tiny_model().to(torch.bfloat16), id="bf16"),
    ],
)
def test_it_is_what_save_pretrained_writes(model: object, tmp_path: Path) -> None:
    """The same files, config and tensors, bit for bit; it loads to the same model."""
    assert callable(model)
    whole: DvpaForCausalLM = model()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_model(whole, ours, Processes())
    whole.save_pretrained(theirs)
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for name in ("config.json", "tier_map.json", "modeling_dvpa.py"):
        assert (ours / name).read_text() == (theirs / name).read_text(), name
    found, expected = (load_file(f / "model.safetensors") for f in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    state = DvpaForCausalLM.from_pretrained(ours).state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(state[name], tensor), name
