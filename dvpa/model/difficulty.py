"""The difficulty head: one prompt, one number, and the odds of every tier on the same scale.

An ordinal (Rasch / IRT) model: prompt difficulty z and tier abilities theta lie on one axis, and
`P(tier t suffices) = sigmoid(a (theta_t - z))` with theta increasing. It reads detached states, so
training it never moves the backbone. Beside the states it sees how sure the base tier is of the
next token at that depth (the "logit lens": final norm and lm_head applied to the last prompt
state): whether a fact is known shows there first.

Letters: B batch, S prompt positions, D hidden, N tiers, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvpa.config import DvpaConfig
from dvpa.model.attention import DvpaRMSNorm

# Without it the head memorises its few thousand prompts and neglects the three certainties.
STATE_DROPOUT = 0.5
NUM_CERTAINTIES = 3


@dataclass(frozen=True)
class HeadOutput:
    """The head's fp32 scores of B prompts.

    `z` [B], unbounded; `success` [B, N], nondecreasing over tiers; `difficulty` [B] in [0, 1].
    """

    z: Tensor
    success: Tensor
    difficulty: Tensor


class DifficultyHead(nn.Module):
    """Attention with a learned query over a prompt's states, its last state, certainty; an MLP."""

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__()
        assert config.difficulty is not None
        width = config.difficulty.hidden_size
        self.norm = DvpaRMSNorm(config.hidden_size)
        self.query = nn.Linear(config.hidden_size, 1, bias=False)
        self.fc1 = nn.Linear(2 * config.hidden_size + NUM_CERTAINTIES, width)
        self.fc2 = nn.Linear(width, 1, bias=False)
        # theta_0, then the (softplus) steps between tiers; log_slope is log a.
        self.theta = nn.Parameter(torch.zeros(config.num_tiers))
        self.log_slope = nn.Parameter(torch.zeros(1))

    def forward(self, states_BSD: Tensor, mask_BS: Tensor, logits_BV: Tensor) -> HeadOutput:
        """Score prompts.

        Args:
            states_BSD: states at the probe layer; mask_BS: True on prompt positions.
            logits_BV: the logit lens at the last prompt position.
        """
        states, scores_BS = self.look(states_BSD)
        mask_BS = mask_BS.bool()
        scores_BS = scores_BS.masked_fill(~mask_BS, float("-inf"))
        pooled_BD = torch.einsum("bs,bsd->bd", scores_BS.softmax(-1).to(states.dtype), states)
        return self.judge(pooled_BD, last_position(states, mask_BS), logits_BV)

    def look(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised states [..., D] and how much attention each asks for, fp32 [...]."""
        states = self.norm(states.detach().to(self.fc1.weight.dtype))
        return states, self.query(states).squeeze(-1).float()

    def judge(self, pooled_BD: Tensor, last_BD: Tensor, logits_BV: Tensor) -> HeadOutput:
        """Score prompts from their pooled and last (normalised) states and the logit lens."""
        read = torch.cat((pooled_BD, last_BD), -1)
        read = F.dropout(read, STATE_DROPOUT, training=self.training)
        features = torch.cat((read, certainty(logits_BV.detach()).to(read.dtype)), -1)
        return self.on_scale(self.fc2(F.gelu(self.fc1(features))).squeeze(-1).float())

    def on_scale(self, z_B: Tensor) -> HeadOutput:
        """Place z beside the tiers' abilities."""
        steps = F.softplus(self.theta[1:].float())
        theta_N = torch.cat((self.theta[:1].float(), self.theta[0].float() + steps.cumsum(0)))
        success_BN = torch.sigmoid(self.log_slope.float().exp() * (theta_N - z_B[:, None]))
        return HeadOutput(z=z_B, success=success_BN, difficulty=1 - success_BN[:, 0])


def last_position(states_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """The state at the last True position of each row, [B, D]; padding may be on either side."""
    positions = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = (positions * mask_BS).amax(1)
    return states_BSD[torch.arange(len(states_BSD), device=states_BSD.device), last_B]


def certainty(logits_BV: Tensor) -> Tensor:
    """Log probability of the likeliest token, lead over the next, entropy (nats); fp32 [B, 3]."""
    log_p = logits_BV.float().log_softmax(-1)
    first, second = log_p.topk(2, dim=-1).values.unbind(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack((first, first - second, entropy), -1)
