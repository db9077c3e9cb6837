"""Where a stage's weights come from, slice by slice: bit for bit what a single process has."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_world import KV, edit_config, make_fp8_source
from helpers import YARN, mtp_model, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpa.checkpoint import convert_checkpoint
from dvpa.config import DvpaConfig, load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa_train import draws
from dvpa_train.growth import ROUTER_STD, Grown, attach_head
from dvpa_train.origins import Drawn, Held, Stored
from dvpa_train.slices import Slice, slice_of, slices_of
from dvpa_train.stacked import is_stacked
from dvpa_train.starts import sharded_start

EVERYTHING: dict[str, Any] = {
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "q_lora_rank": 8,
    "rope_parameters": YARN,
}


def empty_slices(config: DvpaConfig) -> dict[str, Slice]:
    """Of the whole model, with values that nothing draws."""
    with torch.device("meta"):
        shapes = slices_of(DvpaForCausalLM(config))
    whole = {name: torch.full(part.local.shape, torch.nan) for name, part in shapes.items()}
    for name in whole:
        if is_stacked(name):
            whole[name] = whole[name][0]
    return {name: slice_of(name, tensor) for name, tensor in whole.items()}


def check_same(slices: dict[str, Slice], state: dict[str, Tensor]) -> None:
    assert slices.keys() <= state.keys()
    for name, part in slices.items():
        assert torch.equal(part.local.reshape(state[name].shape), state[name]), name


# -- random weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 22, 64])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(EVERYTHING, id="everything"),
        pytest.param({"hidden_size": 33, "moe_intermediate_size": 5}, id="odd"),
    ],
)
def test_drawn_weights_are_the_constructors(
    changes: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor, and where the generator stands afterwards."""
    monkeypatch.setattr(draws, "PIECE", piece)
    config = tiny_config(**changes)
    torch.manual_seed(7)
    state = DvpaForCausalLM(config).state_dict()
    after = torch.get_rng_state()
    slices = empty_slices(config)
    Drawn(config, seed=7).fill(slices)
    check_same(slices, state)
    assert len(slices) == len(state) - config.tie_word_embeddings
    assert torch.equal(torch.get_rng_state(), after)


def test_no_piece_is_larger_than_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "PIECE", 64)
    config = tiny_config()
    expert = 2 * config.moe_intermediate_size * config.hidden_size
    sizes = [rows.numel() for name, _, rows in draws.draw(config) if is_stacked(name)]
    assert max(sizes) == expert


# -- slices ---------------------------------------------------------------------------------------


@st.composite
def cut(draw: Any, size: int) -> slice:
    start = draw(st.integers(0, size))
    return slice(start, draw(st.integers(start, size)))


@settings(max_examples=60)
@given(st.data())
def test_a_slice_keeps_what_it_holds_of_rows_put_in_any_pieces(data: st.DataObject) -> None:
    stacked = data.draw(st.booleans())
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    if stacked:
        shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), 4, 6)
    index = [data.draw(cut(size)) for size in shape]
    if stacked:  # no process has part of the groups
        index[0] = slice(0, shape[0])
    values = torch.randn(shape)
    part = Slice(torch.full_like(values[tuple(index)], torch.nan), shape, tuple(index), stacked)
    rows = values.flatten(0, 1) if stacked else values
    first = 0
    while first < len(rows):
        count = data.draw(st.integers(1, len(rows) - first))
        part.put(first, rows[first : first + count])
        first += count
    assert torch.equal(part.local, values[tuple(index)])


def test_whole_stacked_experts_are_one_group() -> None:
    values = torch.randn(6, 2, 3)
    part = slice_of("model.layers.1.mlp.experts.down_proj", values)
    assert part.shape == (1, 6, 2, 3)
    assert [expert for expert, _, _ in part.experts()] == list(range(6))
    assert [expert for expert, _, _ in part.experts(2, 4)] == [2, 3]


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_are_those_of_from_pretrained(dtype: torch.dtype, tmp_path: Path) -> None:
    mtp_model(tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path)
    loaded = DvpaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    slices = empty_slices(loaded.config)
    Stored(tmp_path).fill(slices)
    check_same(slices, loaded.state_dict())


def test_only_the_slice_is_taken(tmp_path: Path) -> None:
    """Rows and columns that end inside gate and up, as processes sharing an expert hold them."""
    tiny_model().save_pretrained(tmp_path)
    state = DvpaForCausalLM.from_pretrained(tmp_path).state_dict()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    grouped = state[name].unflatten(0, (4, 4))
    for rows in (slice(0, 16), slice(12, 20), slice(16, 32), slice(0, 32)):
        index = (slice(0, 4), slice(2, 4), rows, slice(8, 24))
        part = Slice(torch.empty(grouped[index].shape), tuple(grouped.shape), index, True)
        Stored(tmp_path).fill({name: part})
        assert torch.equal(part.local, grouped[index]), rows
    index = (slice(10, 30), slice(0, 32))
    part = Slice(torch.empty(20, 32), (64, 32), index, False)
    Stored(tmp_path).fill({"lm_head.weight": part})
    assert torch.equal(part.local, state["lm_head.weight"][index])


def test_fp8_weights_are_dequantised(tmp_path: Path) -> None:
    """Whole, and slices that begin and end inside blocks."""
    source = make_fp8_source(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "dvpa", None)
    state = DvpaForCausalLM.from_pretrained(tmp_path / "dvpa", dtype=torch.float32).state_dict()
    stored = Stored(tmp_path / "dvpa")
    assert stored.describe() == f"reads {tmp_path / 'dvpa'}, 40 weights from FP8"
    slices = empty_slices(DvpaConfig.from_pretrained(tmp_path / "dvpa"))
    stored.fill(slices)
    check_same(slices, state)
    for rows, columns in ((slice(100, 550), slice(127, 129)), (slice(512, 576), slice(0, 160))):
        part = Slice(
            torch.empty(state[KV][rows, columns].shape), (576, 160), (rows, columns), False
        )
        stored.fill({KV: part})
        assert torch.equal(part.local, state[KV][rows, columns])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    grouped = state[name].unflatten(0, (2, 4))
    for rows in (slice(0, 130), slice(130, 160), slice(144, 288)):
        index = (slice(0, 2), slice(1, 3), rows, slice(120, 140))
        part = Slice(torch.empty(grouped[index].shape), tuple(grouped.shape), index, True)
        stored.fill({name: part})
        assert torch.equal(part.local, grouped[index]), rows
    edit_config(tmp_path / "dvpa", quantization_config=None)
    with pytest.raises(ValueError, match=r"FP8, but config\.json says nothing of it"):
        Stored(tmp_path / "dvpa")


def test_a_checkpoint_with_a_hole_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight: missing"):
        Stored(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="safetensors"):
        Stored(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        Stored(tmp_path / "nowhere")


def test_a_start_keeps_generation_settings_and_drops_the_head(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(tmp_path)
    start = sharded_start(model.config.truncate(3), tmp_path, seed=0)
    assert start.model.difficulty_head is None
    assert start.model.config.difficulty is None
    assert start.model.generation_config.temperature == 0.7
    assert {tensor.device.type for tensor in start.model.parameters()} == {"meta"}
    assert start.origin is not None and start.origin.describe() == f"reads {tmp_path}"
    fresh = sharded_start(load_model_config("model/dvpa-7b-32b.yaml").truncate(1), None, seed=0)
    assert fresh.origin is not None
    # 48.5 billion numbers; some more are drawn twice or not, as Transformers' versions have it.
    assert re.fullmatch(r"draws 4[0-9]\.\dB random weights", fresh.origin.describe())


# -- growth ---------------------------------------------------------------------------------------


def grown_by_hand(small: DvpaForCausalLM, config: DvpaConfig, seed: int) -> dict[str, Tensor]:
    """A fresh model with the old weights put into it."""
    torch.manual_seed(seed)
    state = DvpaForCausalLM(config).state_dict()
    routers = torch.Generator().manual_seed(seed)
    for name, old in small.state_dict().items():
        new = state[name]
        if name.endswith("gate.weight"):
            new[len(old) :].normal_(0.0, ROUTER_STD, generator=routers)
        elif name.endswith("tier_bias"):
            new[len(old) :, : old.shape[1]] = old[-1]
        elif name.endswith("experts.down_proj"):
            new[len(old) :] = 0
        new[tuple(slice(0, size) for size in old.shape)] = old
    return state


@pytest.mark.parametrize("tiers", [(1, 2), (2, 3), (1, 3)])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("stored", [False, True])
def test_growth_is_a_fresh_model_with_the_old_weights_in_it(
    stored: bool, changes: dict[str, Any], tiers: tuple[int, int], tmp_path: Path
) -> None:
    full = tiny_config(**changes)
    small, config = tiny_model(full.truncate(tiers[0])), full.truncate(tiers[1])
    small.save_pretrained(tmp_path)
    source = Stored(tmp_path) if stored else Held(small.state_dict())
    slices = empty_slices(config)
    before = torch.get_rng_state()
    Grown(source, small.config, config, seed=5).fill(slices)
    assert torch.equal(torch.get_rng_state(), before)
    check_same(slices, grown_by_hand(small, config, 5))


def test_the_head_is_the_one_of_a_fresh_model() -> None:
    full = tiny_config()
    torch.manual_seed(3)
    fresh = DvpaForCausalLM(full).difficulty_head
    model = tiny_model(full.truncate(3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    attach_head(model, full, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.difficulty_head is not None and fresh is not None
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.difficulty_head.state_dict()[name], tensor), name
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.config.to_dict()["difficulty"] == full.to_dict()["difficulty"]
    assert model.score(torch.arange(3, 9)[None]).difficulty.shape == (1,)
