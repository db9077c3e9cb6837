"""Tier self-speculation: which drafted tokens the request's own tier would have produced.

Greedy: a draft stands while it is the token the tier picks. Sampled: rejection sampling (Leviathan
et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), which leaves the distribution as it is. At
a rejection the tier's own token takes the place; if all stand, one more token comes for free.

Letters: K drafted tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dvpa.engine.sampler import Sampler, SampleRow, draw, uniform

DRAFT_STREAM, ACCEPT_STREAM, TOKEN_STREAM = 2, 1, 0


def draft_token(
    sampler: Sampler, logits_V: Tensor, row: SampleRow
) -> tuple[int, Tensor | None] | None:
    """One drafted token and, unless greedy, the distribution it was drawn from [V].

    None: nothing can be drafted from these logits (see `Sampler.sample`).
    """
    if row.params.is_greedy:
        sampled = sampler.sample(logits_V[None], [row])[0]
        return None if sampled is None else (sampled.token_id, None)
    proposal = sampler.distributions(logits_V[None], [row])[0]
    if proposal is None:
        return None
    return draw(proposal, uniform(row.seed, row.position, DRAFT_STREAM)), proposal


def verify(
    sampler: Sampler,
    logits_KV: Tensor,
    row: SampleRow,
    draft: Sequence[int],
    proposals: Sequence[Tensor | None],
) -> list[int] | None:
    """The tokens to keep, 1 .. K + 1 of them, from the tier's logits at K + 1 positions.

    `proposals[j]` is the distribution `draft[j]` was drawn from (None when greedy). Returns None
    where the logits cannot be sampled.
    """
    kept: list[int] = []
    for j, logits_V in enumerate(logits_KV):
        outputs = [*row.output_token_ids, *kept]
        here = replace(row, output_token_ids=outputs, position=row.position + j)
        guess = draft[j] if j < len(draft) else None
        token = _settle(sampler, logits_V, here, guess, proposals[j] if j < len(draft) else None)
        if token is None:
            return None
        kept.append(token)
        if token != guess:
            break
    return kept


def _settle(
    sampler: Sampler, logits_V: Tensor, row: SampleRow, guess: int | None, proposal: Tensor | None
) -> int | None:
    """The token at one position: the guess if it stands, else the tier's own."""
    if row.params.is_greedy:
        sampled = sampler.sample(logits_V[None], [row])[0]
        return None if sampled is None else sampled.token_id
    target = sampler.distributions(logits_V[None], [row])[0]
    if target is None:
        return None
    if guess is not None:
        assert proposal is not None, "a sampled draft comes with its distribution"
        share = float(target[guess] / proposal[guess])
        if uniform(row.seed, row.position, ACCEPT_STREAM) < share:
            return guess
        # What the draft overrates cannot come out here. All zero: the two agree up to rounding.
        rest = (target - proposal).clamp(min=0)
        target = rest if rest.sum() > 0 else target
    return draw(target, uniform(row.seed, row.position, TOKEN_STREAM))
