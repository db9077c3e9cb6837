"""The multi-token prediction module against one made of Transformers' parts, and its limits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_layers
from helpers import Batch, left_padded, logits_with_mtp, mtp_model, tiny_config, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from dvpa.checkpoint import export_tier
from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa.model.router import NO_TIER

PREFIX = "model.layers.3."  # one past the last layer
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied-q-lora": {"tie_word_embeddings": True, "q_lora_rank": 12, "rms_norm_eps": 1e-2},
    "bias": {"attention_bias": True, "q_lora_rank": 12, "norm_topk_prob": False},
}


@pytest.fixture(scope="module")
def model() -> DvpaForCausalLM:
    return mtp_model()


@pytest.fixture(scope="module")
def saved(model: DvpaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    model.save_pretrained(folder)
    return folder


# -- what it computes -----------------------------------------------------------------------------


class Oracle(nn.Module):
    """The module from Transformers' parts, over the tensors of an export."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.main = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
        self.main.set_attn_implementation("eager")
        config = self.main.config
        tensors = load_file(folder / "model.safetensors")
        own = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
        self.embedding, self.head = (
            own.pop("embed_tokens.weight"),
            own.pop("shared_head.head.weight"),
        )
        self.norms: dict[str, nn.Module] = {}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            norm.weight.data = own.pop(f"{name}.weight")
            self.norms[name] = norm
        self.eh_proj = own.pop("eh_proj.weight")
        gate_up, down = [], []
        for expert in range(config.n_routed_experts):
            gate, up, out = (
                own.pop(f"mlp.experts.{expert}.{part}_proj.weight")
                for part in ("gate", "up", "down")
            )
            gate_up.append(torch.cat((gate, up)))
            down.append(out)
        own["mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        own["mlp.experts.down_proj"] = torch.stack(down)
        self.layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers).eval()
        self.layer.load_state_dict(own)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of every position, and of the token after the next at all but the last."""
        ids, mask, positions = batch
        hidden = self.main.model(**batch._asdict(), use_cache=False).last_hidden_state
        embeds = self.norms["enorm"](F.embedding(ids[:, 1:], self.embedding))
        joined = torch.cat((embeds, self.norms["hnorm"](hidden[:, :-1])), -1)
        length = joined.shape[1]
        visible = torch.ones(length, length).tril().bool() & mask[:, None, None, :-1].bool()
        out = self.layer(
            joined @ self.eh_proj.T,
            attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min),
            position_ids=positions[:, :-1],
            position_embeddings=self.main.model.rotary_emb(joined, positions[:, :-1]),
        )
        out = out[0] if isinstance(out, tuple) else out
        return self.main.lm_head(hidden), self.norms["shared_head.norm"](out) @ self.head.T


@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_parity_with_transformers_parts_at_every_tier(case: str, tmp_path: Path) -> None:
    model = mtp_model(seed=list(CASES).index(case), **CASES[case])
    model.save_pretrained(tmp_path / "dvpa")
    batch = left_padded([10, 7, 3], seed=3)
    valid = batch.attention_mask.bool()
    for tier in range(3):
        export_tier(tmp_path / "dvpa", tier, tmp_path / str(tier), keep_mtp=True)
        ours, mtp = logits_with_mtp(model, batch, tier)
        theirs, their_mtp = Oracle(tmp_path / str(tier))(batch)
        scale = float(their_mtp.abs().max())
        assert (ours - theirs)[valid].abs().max() <= 1e-5 * float(theirs.abs().max())
        assert (mtp - their_mtp)[valid[:, :-1]].abs().max() <= 1e-5 * scale


@pytest.mark.skipif(
    not hasattr(transformers.modeling_layers, "MtpModel"),
    reason="this Transformers has no MtpModel",
)
@torch.no_grad()
def test_transformers_own_module_loads_the_export(saved: Path, tmp_path: Path) -> None:
    """By V3's names; it looks for them at the layers that V3's class is told to ignore."""
    from transformers.cache_utils import MtpCache

    export_tier(saved, 2, tmp_path / "top", keep_mtp=True)
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "top").eval()
    reference._keys_to_ignore_on_load_unexpected = {r"model\.layers\.3\."}
    theirs = transformers.modeling_layers.MtpModel.from_pretrained(reference).eval()
    ids = left_padded([9]).input_ids
    hidden = reference.model(ids, use_cache=False).last_hidden_state
    tokens, logits, _ = theirs(
        input_ids=ids[:, 1:],
        last_hidden_states=hidden[:, :-1],
        attention_mask=torch.ones(1, 8, dtype=torch.long),
        position_ids=torch.arange(1, 9)[None],
        mtp_cache=MtpCache(config=reference.config.get_mtp_config()),
    )
    _, mtp = logits_with_mtp(
        DvpaForCausalLM.from_pretrained(saved).eval(), Batch(ids, None, None), 2
    )
    assert (mtp[:, -1] - logits[:, 0]).abs().max() <= 1e-5 * float(logits.abs().max())
    assert int(tokens) == int(mtp[0, -1].argmax())


@torch.no_grad()
def test_logits_without_it_are_those_with_it(model: DvpaForCausalLM) -> None:
    batch = left_padded([8, 5])
    without = tiny_model(tiny_config())
    without.load_state_dict(model.state_dict(), strict=False)
    for tiers in (None, 0, torch.tensor([2, 1])):
        plain = without(**batch._asdict(), tiers=tiers, use_cache=False)
        out = model(**batch._asdict(), tiers=tiers, use_cache=False, with_mtp=True)
        assert torch.equal(plain.logits, out.logits)
        assert len(out.routing) == len(plain.routing) == 2
        assert model(**batch._asdict(), tiers=tiers).mtp_logits is None
    kwargs: dict[str, Any] = {**batch._asdict(), "max_new_tokens": 6, "do_sample": False}
    kwargs.pop("position_ids")
    assert torch.equal(model.generate(**kwargs, tiers=1), without.generate(**kwargs, tiers=1))


@pytest.mark.parametrize("with_positions", [True, False])
@torch.no_grad()
def test_a_position_depends_on_its_own_past_and_tier_only(
    model: DvpaForCausalLM, with_positions: bool
) -> None:
    batch, tiers = left_padded([9, 6, 4]), torch.tensor([0, 2, 1])
    if not with_positions:  # then only the mask says where a row begins
        batch = batch._replace(position_ids=None)
    _, together = logits_with_mtp(model, batch, tiers)
    for row, tier in enumerate(tiers.tolist()):
        length = int(batch.attention_mask[row].sum())
        ids = batch.input_ids[row, -length:][None]
        _, alone = logits_with_mtp(model, Batch(ids, None, None), tier)
        assert torch.allclose(together[row, -(length - 1) :], alone[0], atol=1e-5)
        changed = ids.clone()
        changed[0, -1] = 3 if ids[0, -1] != 3 else 4
        _, later = logits_with_mtp(model, Batch(changed, None, None), tier)
        assert torch.equal(later[:, :-1], alone[:, :-1])  # only the last one reads the last token
        assert not torch.allclose(later[:, -1], alone[:, -1])


@torch.no_grad()
def test_padding_on_either_side_brings_no_expert_rows(model: DvpaForCausalLM) -> None:
    tiers = torch.tensor([[0, 1, 1, 2, NO_TIER], [NO_TIER, NO_TIER, 2, 0, 0]])
    ids = left_padded([5, 5]).input_ids
    routing = model(ids, tiers=tiers, use_cache=False, with_mtp=True).mtp_routing
    x = NO_TIER
    assert routing.tiers.view(2, 4).tolist() == [[0, 1, 1, x], [x, x, 2, 0]]
    rows = (routing.topk_index < 16).sum(1).view(2, 4).tolist()
    assert rows == [[2, 3, 3, 0], [0, 0, 5, 2]]


@torch.no_grad()
def test_a_mask_made_by_the_caller_is_cut_too(model: DvpaForCausalLM) -> None:
    """Two documents in one row: the second predicts what it predicts alone."""
    ids, document = left_padded([9]).input_ids, torch.tensor([0] * 5 + [1] * 4)
    seen = torch.ones(9, 9).tril().bool() & (document[:, None] == document)
    packed = model(ids, attention_mask=seen[None, None], tiers=2, use_cache=False, with_mtp=True)
    _, alone = logits_with_mtp(model, Batch(ids[:, 5:], None, None), 2)
    assert torch.allclose(packed.mtp_logits[:, 5:], alone, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_survive_checkpointing(model: DvpaForCausalLM, reentrant: bool) -> None:
    batch, gradients = left_padded([7, 7]), []
    for recompute in (False, True):
        copy = mtp_model()
        copy.load_state_dict(model.state_dict())
        copy.train()
        if recompute:
            copy.gradient_checkpointing_enable({"use_reentrant": reentrant})
        logits_with_mtp(copy, batch, 1)[1].pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in copy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_gradient_reaches_trunk_embedding_head_and_module(model: DvpaForCausalLM) -> None:
    model.zero_grad()
    logits_with_mtp(model, left_padded([9, 9]), 2)[1].pow(2).mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    parts = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "mlp.gate", "self_attn.o_proj")
    names = {f"{PREFIX}{part}.weight" for part in parts}
    names |= {f"{PREFIX}mlp.experts.down_proj", "model.layers.0.mlp.up_proj.weight"}
    names |= {"model.layers.1.mlp.experts.gate_up_proj", "lm_head.weight", "model.norm.weight"}
    assert names | {"model.embed_tokens.weight"} <= reached


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2, -1, True, "1", 1.0, None])
def test_other_depths_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers: .* must be 0 or 1"):
        tiny_config(num_nextn_predict_layers=value)


def test_truncating_keeps_it(model: DvpaForCausalLM) -> None:
    small = model.config.truncate(2)
    assert small.num_nextn_predict_layers == 1
    again: DvpaConfig = DvpaConfig.from_dict(small.to_dict())
    assert again.num_nextn_predict_layers == 1


@torch.no_grad()
def test_what_it_cannot_run_on_is_refused(model: DvpaForCausalLM) -> None:
    ids = left_padded([4]).input_ids
    with pytest.raises(ValueError, match="with_mtp: this model has no such module"):
        tiny_model()(ids, tiers=0, with_mtp=True)
    with pytest.raises(ValueError, match="with_mtp: needs sequences of two tokens or more"):
        model(ids[:, :1], tiers=0, with_mtp=True)
    cache = model(ids, tiers=0, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="with_mtp: needs whole sequences"):
        model(ids[:, :2], tiers=0, past_key_values=cache, with_mtp=True)
