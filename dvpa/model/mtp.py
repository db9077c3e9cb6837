"""Multi-token prediction: one more layer, which predicts the token after the next.

DeepSeek-V3, arXiv 2412.19437, section 2.2, at depth 1. With `h_i` the state of the stack at
position i and `t` the tokens:

    x_i = eh_proj([enorm(embed(t_{i+1})); hnorm(h_i)])        embedding first, then the state
    y   = one decoder layer over x, its experts in tiers as everywhere
    logits_i = lm_head(shared_head.norm(y_i))                 of token t_{i+2}

Embedding and head are the model's own. Names are V3's: the module is the layer after the last,
`model.layers.{num_hidden_layers}`. What the paper leaves open follows those who run V3's weights:

- `h_i` is the state *after* the final norm; `hnorm` comes on top. vLLM and Megatron-LM hand over
  what the main model returns, which is normalised; ROCm/ATOM pull request 1764 traces it to the
  modelling code beside the weights (vLLM pull request 47448 repairs a case of the other choice).
- The embedding comes first in `eh_proj`'s input (vLLM `deepseek_mtp.py`, SGLang `deepseek_nextn.py`
  and Transformers' `MtpLayer`), although equation 21 writes the state first.
- vLLM zeroes the embedding at position 0. The paper, SGLang and Transformers do not; nor does this.

As a draft for decoding it needs, at every position i of the text so far, `h_i` as `DvpaModel`
returns it and the token that was sampled from it, t_{i+1}, and keys and values of its own for the
positions before. The engine does not use it yet.

Letters: B batch, S positions, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dvpa.config import DvpaConfig
from dvpa.model.attention import DvpaRMSNorm
from dvpa.model.decoder import DvpaDecoderLayer
from dvpa.model.router import NO_TIER, Routing, TierPlan


class SharedHead(nn.Module):
    """The norm before the model's own head; a module of its own for the sake of V3's names."""

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__()
        self.norm = DvpaRMSNorm(config.hidden_size, config.rms_norm_eps)


class DvpaMtpLayer(DvpaDecoderLayer):
    """The multi-token prediction module, without embedding and head."""

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = DvpaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DvpaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(  # type: ignore[override]  # the same layer behind one more input
        self, hidden: Tensor, plan: TierPlan, next_embeds: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Routing | None]:
        """States after the final norm and embeddings of the next tokens, both [B, S, D].

        Returns:
            What the head reads, [B, S, D], and what the module's router decided.
        """
        joined = torch.cat((self.enorm(next_embeds), self.hnorm(hidden)), -1)
        hidden, routing = super().forward(self.eh_proj(joined), plan, **kwargs)
        return self.shared_head.norm(hidden), routing


def pair_plan(plan: TierPlan) -> TierPlan:
    """The plan [B, S] of a stack as the module's, [B, S - 1]: position i at the tier of its state.

    A position that is padding, or whose next token is, brings no expert rows.
    """
    tiers_BS = plan.tiers[:, :-1]
    return TierPlan(tiers_BS.masked_fill(plan.tiers[:, 1:] == NO_TIER, NO_TIER), plan.max_tier)
