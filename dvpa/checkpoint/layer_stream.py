"""A source's decoder over a calibration text, with the weights of one layer in memory at a time.

It passes at the source's own setting, or at a tier that is only planned: the router's rows are put
in the planned order, and what it chooses is looked up in the source's.

Letters: N sequences, L positions, D hidden, T tokens, E routed experts, K slots.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvpa.checkpoint.source import EMBEDDING, HEAD, Source
from dvpa.config import DvpaConfig
from dvpa.model.causal_lm import DvpaForCausalLM
from dvpa.model.decoder import DvpaDecoderLayer, DvpaRotaryEmbedding
from dvpa.model.experts import DvpaExperts, DvpaMoE
from dvpa.model.router import DvpaRouter, Routing, TierPlan
from dvpa.model.tensor_names import TIER_BIAS, expert_index, tensor_shapes
from dvpa.ops import expert_mlp

LAYERS = "model.layers."
ROWS_AT_ONCE = 4096  # positions in one pass through a layer
LOGITS_AT_ONCE = 256  # positions whose logits are in memory together

# (expert, share of the token's weights [R], its output [R, D]) of the rows routed to one expert.
Observer = Callable[[int, Tensor, Tensor], None]


class PlannedRouter:
    """A tier's routing as planned, given in the source's expert numbers."""

    def __init__(self, gate: DvpaRouter, config: DvpaConfig, order_E: Tensor, tier: int) -> None:
        with torch.device("meta"):
            self._router = DvpaRouter(config)
        self._router.weight = nn.Parameter(gate.weight[order_E], requires_grad=False)
        self._router.tier_bias = gate.tier_bias[:, order_E].expand(config.num_tiers, -1)
        self._number = torch.cat((order_E, torch.tensor([len(order_E)])))
        self._tier = tier

    def __call__(self, hidden_TD: Tensor) -> Routing:
        """Route T tokens; `topk_index` is the source's."""
        tiers = torch.full((1, len(hidden_TD)), self._tier)
        chosen = self._router(hidden_TD, TierPlan(tiers, self._tier))
        index = self._number[chosen.topk_index]
        return Routing(index, chosen.topk_weight, chosen.scores, chosen.tiers)


class LayerStream:
    """The source's decoder without its weights; each part is read when it is used, then dropped."""

    def __init__(self, source: Source) -> None:
        self.source = source
        config = source.config
        with torch.device("meta"):
            self.model = DvpaForCausalLM(config).eval()
        self.model.model.rotary_emb = DvpaRotaryEmbedding(config=config)
        self._names: dict[str, list[str]] = {}  # of tensors, by layer
        for name in tensor_shapes(config):
            if name.startswith(LAYERS):
                self._names.setdefault(name.split(".")[2], []).append(name)
        # fp16 is widened: its range is too small for the states of large models.
        stored = {source.info(name).dtype for name in tensor_shapes(config)}
        self.dtype = torch.bfloat16 if "BF16" in stored else torch.float32

    def embed(self, ids_NL: Tensor) -> Tensor:
        """States before the first layer, [N, L, D]."""
        return F.embedding(ids_NL, self._read(EMBEDDING))

    def norm(self) -> nn.Module:
        """The final norm."""
        norm = self.model.model.norm
        norm.weight = nn.Parameter(self._read("model.norm.weight"), requires_grad=False)
        return norm

    @contextmanager
    def layer(self, index: int) -> Iterator[DvpaDecoderLayer]:
        """Layer `index` with its weights, which leave memory again with the context."""
        layer = cast("DvpaDecoderLayer", self.model.model.layers[index])
        prefix = f"{LAYERS}{index}."
        if isinstance(layer.mlp, DvpaMoE):
            _make_room(layer.mlp.experts, self.dtype)
        for name in self._names[str(index)]:
            self._fill(layer, name.removeprefix(prefix), self._read(name))
        yield layer
        layer.to("meta")

    @torch.no_grad()
    def run(
        self,
        layer: DvpaDecoderLayer,
        hidden_NLD: Tensor,
        routes: PlannedRouter | None = None,
        observe: Observer | None = None,
    ) -> None:
        """Pass states through a layer, in place; `routes` in place of the layer's own router."""
        step = max(1, ROWS_AT_ONCE // hidden_NLD.shape[1])
        for hidden in hidden_NLD.split(step):
            positions = torch.arange(hidden.shape[1])[None]
            shared = self.model.model.shared_inputs(hidden, None, positions)
            hidden += layer.self_attn(layer.input_layernorm(hidden), **shared)
            normed = layer.post_attention_layernorm(hidden)
            mlp = layer.mlp
            if not isinstance(mlp, DvpaMoE):
                hidden += mlp(normed)
                continue
            normed_TD = normed.flatten(0, 1)
            if routes is not None:
                routing = routes(normed_TD)
            else:
                tiers = torch.zeros(normed.shape[:2], dtype=torch.int64)
                routing = mlp.gate(normed_TD, TierPlan(tiers, 0))
            out_TD = _experts(mlp.experts, normed_TD, routing, observe)
            if mlp.shared_experts is not None:
                hidden += mlp.shared_experts(normed)
            hidden += out_TD.view_as(hidden)

    @torch.no_grad()
    def losses(self, states: Sequence[Tensor], ids_NL: Tensor) -> list[float]:
        """Mean loss of the next token for each of several states [N, L, D] after all layers."""
        norm = self.norm()
        tied = self.source.config.tie_word_embeddings
        head_VD = self._read(EMBEDDING if tied else HEAD)
        wanted_T = ids_NL[:, 1:].flatten()
        means = []
        for hidden_NLD in states:
            read_TD = norm(hidden_NLD[:, :-1]).flatten(0, 1)
            total = 0.0
            parts = zip(read_TD.split(LOGITS_AT_ONCE), wanted_T.split(LOGITS_AT_ONCE), strict=True)
            for read, wanted in parts:
                logits = F.linear(read, head_VD).float()
                total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            means.append(total / len(wanted_T))
        return means

    def _read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        return tensor if name.endswith(TIER_BIAS) else tensor.to(self.dtype)

    def _fill(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Put a tensor of the layer where it belongs; a routed expert's into the stack."""
        expert = expert_index(f".{name}")
        if expert is not None:
            experts, width = (
                cast("Any", layer).mlp.experts,
                self.source.config.moe_intermediate_size,
            )
            part = name.split(".")[-2]
            if part == "down_proj":
                experts.down_proj[expert] = value
            else:
                first = 0 if part == "gate_proj" else width
                experts.gate_up_proj[expert, first : first + width] = value
            return
        owner, _, attribute = name.rpartition(".")
        is_buffer = attribute == "tier_bias"
        kept = value if is_buffer else nn.Parameter(value, requires_grad=False)
        setattr(layer.get_submodule(owner), attribute, kept)


def _make_room(experts: DvpaExperts, dtype: torch.dtype) -> None:
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(experts, name).shape
        room = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        setattr(experts, name, room)


def _experts(
    experts: DvpaExperts, hidden_TD: Tensor, routing: Routing, observe: Observer | None
) -> Tensor:
    """What the routed experts give, [T, D]; one by one where somebody wants to see each."""
    index_TK, weight_TK = routing.topk_index, routing.topk_weight
    if observe is None:
        return expert_mlp(hidden_TD, experts.gate_up_proj, experts.down_proj, index_TK, weight_TK)
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
    share_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    for expert in index_TK.unique().tolist():
        if expert == experts.num_experts:
            continue
        token_R, slot_R = (index_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden_TD[token_R], experts.gate_up_proj[expert]).chunk(2, -1)
        out_RD = F.linear(F.silu(gate) * up, experts.down_proj[expert])
        observe(expert, share_TK[token_R, slot_R], out_RD)
        out_TD.index_add_(0, token_R, out_RD.float() * weight_TK[token_R, slot_R, None])
    return out_TD.to(hidden_TD.dtype)
