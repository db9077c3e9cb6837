"""MLA against a naive per-head loop in fp64, absorbed against expanded, what the cache holds."""

import math
from typing import Any

import pytest
import torch
from helpers import YARN, Batch, left_padded, tiny_config, tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dvpa.model import DvpaForCausalLM
from dvpa.model.attention import DvpaAttention

SHAPES = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 12},
        {"q_lora_rank": 12, "attention_bias": True},
        {"rope_interleave": False},
        {"rope_parameters": YARN},
    ],
    ids=["direct-q", "q-lora", "bias", "half-rope", "yarn"],
)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor, angle: Tensor, scale: float, interleaved: bool) -> Tensor:
    """Rotate pairs by `angle`; the pairs are neighbours, or half a head apart.

    The result is ordered in halves, which changes no dot product.
    """
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def naive(attention: DvpaAttention, hidden: Tensor, model: DvpaForCausalLM) -> Tensor:
    """[S, D] -> [S, D] for one unpadded sequence in fp64: section 2.1 of arXiv 2405.04434."""
    config, heads = model.config, attention.num_heads
    state = {name: value.double() for name, value in attention.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))

    rotary = model.model.rotary_emb
    length = len(hidden)
    angle = torch.arange(length).double()[:, None] * rotary.inv_freq.double()
    x = hidden.double()
    if config.q_lora_rank is None:
        query = linear("q_proj", x)
    else:
        latent_query = rms(linear("q_a_proj", x), state["q_a_layernorm.weight"])
        query = linear("q_b_proj", latent_query)
    down = linear("kv_a_proj_with_mqa", x)
    latent = rms(down[:, : config.kv_lora_rank], state["kv_a_layernorm.weight"])
    args = (angle, rotary.attention_scaling, config.rope_interleave)
    key_rope = rotate(down[:, config.kv_lora_rank :], *args)
    key_value = linear("kv_b_proj", latent).view(length, heads, -1)
    query = query.view(length, heads, -1)
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.rope_parameters["rope_type"] == "yarn":
        rope = config.rope_parameters
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    out = []
    for head in range(heads):
        key_nope, value = key_value[:, head].split([config.qk_nope_head_dim, config.v_head_dim], -1)
        q_nope, q_rope = query[:, head].split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], -1
        )
        scores = scale * (q_nope @ key_nope.T + rotate(q_rope, *args) @ key_rope.T)
        future = torch.ones(length, length).triu(1).bool()
        out.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
    return linear("o_proj", torch.cat(out, -1))


def attend(
    model: DvpaForCausalLM, hidden: Tensor, start: int = 0, cache: Any = None
) -> tuple[DvpaAttention, Tensor]:
    """Run layer 0's attention on [1, S, D] from position `start`."""
    attention = model.model.layers[0].self_attn
    positions = torch.arange(start, start + hidden.shape[1])[None]
    rope = model.model.rotary_emb(hidden, positions)
    return attention, attention(hidden, rope, None, past_key_values=cache)


@SHAPES
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_is_the_formula(changes: dict[str, Any], implementation: str) -> None:
    model = tiny_model(tiny_config(**changes))
    model.config._attn_implementation = implementation
    hidden = torch.randn(1, 1, 32)  # one position: eager needs a mask for more
    if implementation == "sdpa":
        hidden = torch.randn(1, 9, 32)
    attention, out = attend(model, hidden)
    expected = naive(attention, hidden[0], model)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-4, atol=1e-5)


@SHAPES
@torch.no_grad()
def test_absorbed_decoding_is_the_formula(changes: dict[str, Any]) -> None:
    """Token by token from the cache; every step after the first takes the absorbed form."""
    model = tiny_model(tiny_config(**changes))
    hidden = torch.randn(1, 7, 32)
    cache = DynamicCache(config=model.config)
    steps = []
    for position in range(7):
        attention, out = attend(model, hidden[:, position : position + 1], position, cache)
        steps.append(out[0, 0])
    expected = naive(attention, hidden[0], model)
    torch.testing.assert_close(torch.stack(steps).double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_absorbed_form_never_expands_the_cache() -> None:
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    cache = DynamicCache(config=model.config)
    attend(model, torch.randn(1, 5, 32), 0, cache)
    called = []
    attention.kv_b_proj.register_forward_hook(lambda *_: called.append(True))
    attend(model, torch.randn(1, 1, 32), 5, cache)
    assert not called
    attend(model, torch.randn(1, 2, 32), 6, cache)
    assert called


@torch.no_grad()
def test_the_cache_holds_the_latent_only() -> None:
    model = tiny_model()
    batch = left_padded([6, 4])
    out = model(batch.input_ids, batch.attention_mask, batch.position_ids, tiers=1)
    for layer in out.past_key_values.layers:
        assert layer.keys.shape == (2, 1, 6, model.config.kv_lora_rank)
        assert layer.values.shape == (2, 1, 6, model.config.qk_rope_head_dim)


def steps(model: DvpaForCausalLM, batch: Batch, sizes: list[int]) -> Tensor:
    """Logits of a batch fed in pieces of the given sizes, from one cache."""
    cache, begin, logits = None, 0, []
    for size in sizes:
        part = slice(begin, begin + size)
        out = model(
            batch.input_ids[:, part],
            batch.attention_mask[:, : begin + size],
            batch.position_ids[:, part],
            past_key_values=cache,
            tiers=torch.tensor([2, 0, 1]),
            use_cache=True,
        )
        cache, begin = out.past_key_values, begin + size
        logits.append(out.logits)
    return torch.cat(logits, 1)


@SHAPES
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sizes", [[9], [5, 1, 1, 1, 1], [4, 3, 2], [8, 1]], ids=str)
@torch.no_grad()
def test_pieces_equal_the_whole(
    changes: dict[str, Any], implementation: str, sizes: list[int]
) -> None:
    """Any split over prefill, chunked prefill and decode, under left padding and mixed tiers."""
    model = tiny_model(tiny_config(**changes))
    model.config._attn_implementation = implementation
    batch = left_padded([9, 6, 2])
    whole = model(*batch, tiers=torch.tensor([2, 0, 1]), use_cache=False).logits  # no cache at all
    valid = batch.attention_mask.bool()
    torch.testing.assert_close(
        steps(model, batch, sizes)[valid], whole[valid], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_eager_equals_sdpa() -> None:
    model = tiny_model()
    batch = left_padded([8, 5, 3])
    logits = []
    for implementation in ("eager", "sdpa"):
        model.config._attn_implementation = implementation
        logits.append(model(*batch, tiers=2).logits[batch.attention_mask.bool()])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_invisible() -> None:
    """The same prompt with more padding on its left gives the same logits."""
    model = tiny_model()
    batch = left_padded([9, 4], seed=3)
    alone = batch.input_ids[1:, 5:]
    for tiers in (0, 1, 2):
        padded = model(*batch, tiers=tiers).logits[1, 5:]
        torch.testing.assert_close(
            padded, model(alone, tiers=tiers).logits[0], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_the_future_is_invisible() -> None:
    model = tiny_model()
    ids = left_padded([8]).input_ids
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 7) % 60 + 3
    first, second = model(ids, tiers=2).logits, model(changed, tiers=2).logits
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])
