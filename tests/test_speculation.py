"""Tier self-speculation: the same tokens when greedy, the same distribution when sampled."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_oracle import NUM_NEW, Arrival, greedy, logits_of, make_engine, oracle, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from dvpa.engine import SamplingParams, SpeculateParams, speculation
from dvpa.engine.sampler import Sampler, SampleRow
from dvpa.engine.speculation import ACCEPT_STREAM, draft_token, verify
from dvpa.pricing import price

V = 6
SAMPLER = Sampler()
logit_rows = st.lists(st.floats(-4, 4, width=32), min_size=V, max_size=V).map(torch.tensor)


def row(output: Sequence[int] = (), seed: int = 0, **params: Any) -> SampleRow:
    own = SamplingParams(max_tokens=None, **params)
    return SampleRow(own, [1, 2], list(output), seed, len(output))


# -- one verification -----------------------------------------------------------------------------


@given(st.lists(logit_rows, min_size=1, max_size=5), st.data())
def test_greedy_drafts_stand_while_they_are_the_best(
    logits: list[Tensor], data: st.DataObject
) -> None:
    best = [int(logits_V.argmax()) for logits_V in logits]
    draft = [data.draw(st.sampled_from([token, 0])) for token in best[:-1]]
    expected = [best[0]]
    for drafted, token, after in zip(draft, best, best[1:], strict=False):
        if drafted != token:
            break
        expected.append(after)
    none = [None] * len(draft)
    assert verify(SAMPLER, torch.stack(logits), row(temperature=0.0), draft, none) == expected
    assert draft_token(SAMPLER, logits[0], row(temperature=0.0)) == (best[0], None)


@settings(max_examples=40)
@given(
    own=logit_rows,
    drafts=logit_rows,
    params=st.sampled_from([{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 3, "min_p": 0.1}]),
)
def test_what_comes_out_has_the_tier_s_own_distribution(
    own: Tensor, drafts: Tensor, params: dict[str, float]
) -> None:
    """Exactly: each guess, how often it is accepted, and what is drawn from otherwise."""
    here = row(**params)
    [target, proposal] = SAMPLER.distributions(torch.stack([own, drafts]), [here, here])
    assert target is not None and proposal is not None
    out_V, bonus = torch.zeros(V), torch.stack([own, own])
    for guess in proposal.nonzero()[:, 0].tolist():
        share = min(float(target[guess] / proposal[guess]), 1.0)
        drawn: list[Tensor] = []

        def first(u: float, guess: int = guess, drawn: list[Tensor] = drawn) -> int:
            """The first token kept for a `uniform` of u; what is drawn from goes to `drawn`."""

            def draw(probability_V: Tensor, _: float) -> int:
                drawn.append(probability_V / probability_V.sum())
                return int(probability_V.argmax())

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(speculation, "uniform", lambda seed, position, stream: u)
                patch.setattr(speculation, "draw", draw)
                kept = verify(SAMPLER, bonus, here, [guess], [proposal])
            assert kept is not None
            return len(kept)

        if share > 1e-3:
            assert first(share - 1e-3) == 2, "accepted: the guess and one token more"
        if share < 1 - 1e-3:
            drawn.clear()
            assert first(share + 1e-3) == 1
            out_V += proposal[guess] * (1 - share) * drawn[0]
        out_V[guess] += proposal[guess] * share
    torch.testing.assert_close(out_V, target, atol=2e-3, rtol=0)


def test_streams_of_randomness_are_apart() -> None:
    """Whether a guess is accepted must not depend on the number it was drawn with."""
    streams = {speculation.DRAFT_STREAM, ACCEPT_STREAM, speculation.TOKEN_STREAM}
    assert len(streams) == 3


def test_logits_that_are_no_numbers_fail() -> None:
    bad = torch.full((V,), float("nan"))
    proposal = torch.full((V,), 1 / V)
    for params in ({"temperature": 0.0}, {}):
        assert draft_token(SAMPLER, bad, row(**params)) is None
        proposals = [None if params else proposal]
        good = torch.zeros(V)
        assert verify(SAMPLER, torch.stack([bad, good]), row(**params), [0], proposals) is None
    assert verify(SAMPLER, torch.stack([good, bad]), row(), [0], [proposal]) is None


# -- through the engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [None, SpeculateParams(length=1), SpeculateParams(length=3)])
def test_sampled_sequences_have_the_exact_distribution(speculate: SpeculateParams | None) -> None:
    known, count, length = oracle(), 1000, 3
    model, prompt = known.model, known.prompts[3]
    of_three = {"logit_bias": {i: -100.0 for i in range(64) if i % 22}, "temperature": 2.0}
    params = SamplingParams(
        n=count, seed=11, max_tokens=length, tier=2, speculate=speculate, **of_three
    )
    engine = make_engine(model, max_num_seqs=64, max_num_batched_tokens=300)
    [output] = engine.generate([prompt], params)
    found = Counter(choice.token_ids for choice in output.choices)
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, p in expected.items():
            logits_V = logits_of(model, [*prompt, *tokens], 2)[-1]
            probability_V = SAMPLER.probabilities(logits_V, row(tokens, **of_three))
            for token in (0, 22, 44):
                longer[*tokens, token] = p * float(probability_V[token])
        expected = longer
    assert set(found) <= set(expected)
    share = torch.tensor([*expected.values()]).double()
    share = (share / share.sum()).numpy()
    assert chisquare([found[tokens] for tokens in expected], count * share).pvalue > 0.01
    if speculate is not None:
        assert 0 < engine.progress.num_accepted < engine.progress.num_drafted


@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_greedy_tokens_and_their_ends_are_those_of_plain_decoding(length: int) -> None:
    known = oracle()
    draft = SpeculateParams(draft_tier="base", length=length)
    engine = make_engine(known.model, max_num_batched_tokens=64)
    stops = [known.answer(i, 2)[i % NUM_NEW] for i in range(20)]
    arrivals = [
        Arrival(
            prompt, greedy(tier=2, speculate=draft, stop_token_ids=[stops[i]], min_tokens=i % 4)
        )
        for i, prompt in enumerate(known.prompts)
    ]
    serve(engine, arrivals)
    plain = [dataclasses.replace(arrival.params, speculate=None) for arrival in arrivals]
    outputs = make_engine(known.model).generate(known.prompts, plain)
    for arrival, output in zip(arrivals, outputs, strict=True):
        assert tuple(arrival.tokens()) == output.token_ids
        assert arrival.last().finish_reason == output.finish_reason
    assert engine.progress.num_accepted > 0


def test_a_draft_counts_and_only_helps_above_its_tier() -> None:
    known = oracle()
    per_token = [tier.flops_per_token for tier in price(known.model.config).tiers]
    prompt, draft = known.prompts[4], SpeculateParams(draft_tier=1, length=2)
    for tier in (0, 1):
        engine = make_engine(known.model)
        [output] = engine.generate([prompt], greedy(tier=tier, speculate=draft))
        assert engine.progress.num_drafted == 0
        assert output.telemetry.flops == (len(prompt) + NUM_NEW - 1) * per_token[tier]
    engine = make_engine(known.model)
    [output] = engine.generate([prompt], greedy(tier=2, speculate=draft))
    drafted, accepted = engine.progress.num_drafted, engine.progress.num_accepted
    # Each verification runs the drafted rows and one more; each gives what stood and one more.
    verifications = NUM_NEW - 1 - accepted
    rows = len(prompt) + verifications + drafted
    assert output.telemetry.flops == rows * per_token[2] + drafted * per_token[1]
    assert output.telemetry.tier_tokens == (0, 0, NUM_NEW)
    assert drafted > verifications
