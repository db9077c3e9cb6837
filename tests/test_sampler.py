"""The sampler against Transformers' logits processors, naive loops and exact statistics."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dvpa.engine.sampler import Sampler, SampleRow, draw, logprobs, uniform
from dvpa.engine.sampling_params import SamplingParams

V = 1000
EOS = 2
SAMPLER = Sampler([EOS])


def random_logits(num_rows, vocab_size=V, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def row(prompt=(), output=(), seed=0, position=None, **params):
    position = len(output) if position is None else position
    return SampleRow(SamplingParams(max_tokens=None, **params), prompt, output, seed, position)


def transformers_distribution(logits_V, params, prompt, output):
    """What Transformers samples from, in vLLM's order of the steps."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p > 0.0:
        steps.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    ids = torch.tensor([[*prompt, *output]], dtype=torch.int64)
    return steps(ids, logits_V[None].clone())[0].softmax(-1)


CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5 * V},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 1e-6},
    {"top_p": 0.99, "temperature": 20.0},  # flat: hundreds of tokens in the nucleus
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distributions_are_those_of_transformers(case):
    prompt, output = list(range(0, 60)), [3, 3, 500, 501]
    for seed, logits_V in enumerate(random_logits(5)):
        one = row(prompt, output, seed, **case)
        ours = SAMPLER.probabilities(logits_V, one)
        theirs = transformers_distribution(logits_V, one.params, prompt, output)
        assert ours.dtype == torch.float32
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_penalties_against_a_loop():
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4, 5]
    one = row(prompt, output, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4)
    for logits_V in random_logits(3, 12):
        expected = []
        for token, value in enumerate(logits_V.tolist()):
            if token in prompt + output:
                value = value / 1.3 if value > 0 else value * 1.3
            times = output.count(token)
            expected.append(value - -0.4 * times - 0.7 * (times > 0))
        torch.testing.assert_close(
            SAMPLER.probabilities(logits_V, one), torch.tensor(expected).softmax(-1)
        )


def test_logit_bias_and_min_tokens():
    logits_V = random_logits(1, 10)[0]
    biased = SAMPLER.probabilities(logits_V, row(logit_bias={4: 2.5, 5: -100.0}))
    expected = logits_V.clone()
    expected[4] += 2.5
    expected[5] -= 100.0
    torch.testing.assert_close(biased, expected.softmax(-1))
    params = {"min_tokens": 3, "stop_token_ids": [7], "logit_bias": {7: 20.0}}
    for output in ([], [1], [1, 1]):
        held = SAMPLER.probabilities(logits_V, row((), output, **params))
        assert held[EOS] == 0.0 and held[7] == 0.0 and (held > 0).sum() == 8
    free = SAMPLER.probabilities(logits_V, row((), [1, 1, 1], **params))
    assert free[7] > 0.99 and free[EOS] > 0.0
    logits_V[EOS] = 50.0
    greedy = {"temperature": 0, "min_tokens": 1}
    (first,) = SAMPLER.sample(logits_V[None], [row(**greedy)])
    (second,) = SAMPLER.sample(logits_V[None], [row((), [1], **greedy)])
    assert first.token_id != EOS and second.token_id == EOS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_first_maximum(dtype):
    logits = random_logits(4, 50, dtype=dtype)
    logits[0, [9, 30]] = 40.0
    sampled = SAMPLER.sample(logits, [row(temperature=0) for _ in range(4)])
    assert [done.token_id for done in sampled] == logits.float().numpy().argmax(-1).tolist()
    assert sampled[0].token_id == 9
    assert sampled[0].logprob is None and sampled[0].top_logprobs is None
    # The same by the long way round, and as a distribution.
    long_way = SAMPLER.sample(logits, [row(temperature=0, logit_bias={0: 0.0})] * 4)
    assert long_way == sampled
    one_hot = SAMPLER.probabilities(logits[0], row(temperature=0, top_k=5, top_p=0.1, min_p=0.3))
    assert one_hot.tolist() == [float(token == 9) for token in range(50)]


def test_greedy_follows_the_penalties():
    logits = torch.tensor([[1.0, 3.0, 2.9, 0.0]])
    (done,) = SAMPLER.sample(logits, [row((), [1], temperature=0, presence_penalty=0.2)])
    assert done.token_id == 2


def test_top_p_cuts_among_equals_at_the_lowest_ids():
    """As a stable sort does; both where few candidates are enough and where they are not."""
    for vocab_size in (8, 4000):
        kept = SAMPLER.probabilities(torch.zeros(vocab_size), row(top_p=0.5)) > 0
        assert kept.tolist() == [token < vocab_size // 2 for token in range(vocab_size)]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.01, 0.999), st.sampled_from([0.1, 1.0, 6.0]))
def test_top_p_is_the_smallest_sufficient_set(seed, top_p, scale):
    logits_V = random_logits(1, 6000, seed, scale, torch.bfloat16)[0]  # bf16: many equals
    full = logits_V.double().softmax(-1)
    kept = SAMPLER.probabilities(logits_V, row(top_p=top_p)) > 0
    order = full.sort(descending=True, stable=True).indices
    num_kept = int(kept.sum())
    assert kept[order[:num_kept]].all()
    assert full[kept].sum() >= top_p - 1e-5
    assert full[order[: num_kept - 1]].sum() < top_p + 1e-5


MIXED = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {},
    {"temperature": 0.7, "logprobs": 1},
    {"top_k": 20},
    {"top_k": 3, "logprobs": 3},
    {"top_p": 0.8},
    {"top_p": 0.9999, "temperature": 50.0},
    {"min_p": 0.2},
    {"presence_penalty": 1.0, "temperature": 0},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": {5: 4.0}},
    {"min_tokens": 9, "top_p": 0.5, "top_k": 30, "min_p": 0.01, "temperature": 1.3},
]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(MIXED), st.integers(0, 50)), min_size=1, max_size=9),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_batch(picks, dtype):
    """Bit for bit, logprobs included, whatever the others ask for."""
    logits = random_logits(len(picks), 3001, 5, dtype=dtype)
    rows = [row([1, 2], [3, 3, 4], seed, **params) for params, seed in picks]
    together = SAMPLER.sample(logits, rows)
    alone = [SAMPLER.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    assert together == alone
    all_at_once = SAMPLER.distributions(logits, rows)
    for logits_V, one, done, probability_V in zip(logits, rows, together, all_at_once, strict=True):
        assert torch.equal(SAMPLER.probabilities(logits_V, one), probability_V)
        assert done.token_id == draw(probability_V, uniform(one.seed, one.position))


def test_logits_are_left_as_they_were():
    logits = random_logits(len(MIXED))
    before = logits.clone()
    SAMPLER.sample(logits, [row([1], [2], **params) for params in MIXED])
    SAMPLER.distributions(logits, [row([1], [2], **params) for params in MIXED])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad):
    rows = [row([1], [2], 3, **params) for params in MIXED]
    logits = random_logits(len(rows))
    expected = SAMPLER.sample(logits, rows)
    assert None not in expected
    for i in range(len(rows)):
        broken = logits.clone()
        broken[i, 17] = bad
        assert SAMPLER.sample(broken, rows) == [*expected[:i], None, *expected[i + 1 :]]
        assert SAMPLER.distributions(broken, rows)[i] is None
        with pytest.raises(FloatingPointError):
            SAMPLER.probabilities(broken[i], rows[i])


def test_a_row_with_every_token_held_back_fails_alone():
    for temperature in (0.0, 1.0):
        stuck = row(min_tokens=1, stop_token_ids=[0, 1, 3], temperature=temperature)
        assert SAMPLER.sample(random_logits(2, 4), [stuck, row()])[0] is None
        assert SAMPLER.sample(random_logits(2, 4), [stuck, row()])[1] is not None


def test_extreme_values_stay_defined():
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0]])
    for params in ({}, {"temperature": 2e-5}, {"temperature": 100.0}, {"top_p": 0.5}):
        assert SAMPLER.sample(logits, [row(**params)])[0].token_id == 0
    assert SAMPLER.sample(torch.empty(0, 4), []) == [] == SAMPLER.distributions(logits[:0], [])


def test_logprobs_are_the_models_own():
    logits = random_logits(3, 60, dtype=torch.bfloat16)
    expected = logits.double().log_softmax(-1)
    rows = [
        row(temperature=5.0, logit_bias={1: 9.0}, logprobs=4),
        row(temperature=0, logprobs=0),
        row(top_k=2, logprobs=20),
    ]
    for i, done in enumerate(SAMPLER.sample(logits, rows)):
        num_top = rows[i].params.logprobs
        assert done.logprob == pytest.approx(expected[i, done.token_id].item(), abs=1e-5)
        assert len(done.top_logprobs) == num_top
        values = list(done.top_logprobs.values())
        assert values == sorted(values, reverse=True)
        best = expected[i].sort(descending=True).values[:num_top].tolist()
        assert values == pytest.approx(best, abs=1e-5)
        for token, value in done.top_logprobs.items():
            assert value == pytest.approx(expected[i, token].item(), abs=1e-5)
    ((_, everything),) = logprobs(logits[:1], [0], 60)
    assert sum(map(math.exp, everything.values())) == pytest.approx(1.0, abs=1e-5)


def test_draws_have_the_right_frequencies():
    """Chi-square over 20,000 seeded draws through `sample`, cut and uncut."""
    logits_V = random_logits(1, 30, 1, 1.0)[0]
    for params in ({}, {"top_k": 12, "temperature": 1.4}):
        one = row(**params)
        probability_V = SAMPLER.probabilities(logits_V, one)
        rows = [row(seed=seed % 100, position=seed // 100, **params) for seed in range(20_000)]
        counts = Counter(s.token_id for s in SAMPLER.sample(logits_V.expand(20_000, -1), rows))
        support = probability_V.nonzero()[:, 0].tolist()
        assert set(counts) <= set(support)
        share = probability_V[support].double()
        expected = (share / share.sum() * 20_000).tolist()
        assert chisquare([counts[token] for token in support], expected).pvalue > 1e-3


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-3, 0.25, 1.0]), min_size=1, max_size=900),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_draw_is_the_inverse_cdf(values, u):
    weights = torch.tensor(values)
    if weights.sum() == 0:
        with pytest.raises(ValueError, match="probabilities"):
            draw(weights, u)
        return
    token = draw(weights, u)
    exact = weights.double().cumsum(0)
    target = u * exact[-1]
    assert weights[token] > 0
    assert exact[token] >= target - 1e-9
    assert exact[token] - weights[token] <= target + 1e-9


def test_draw_at_the_ends():
    assert draw(torch.ones(1), 0.0) == 0
    for vocab_size in (2, 255, 256, 257, 1000):
        weights = torch.zeros(vocab_size)
        weights[[0, vocab_size - 1]] = 0.5
        assert draw(weights, 0.0) == 0
        assert draw(weights, 1 - 2**-53) == vocab_size - 1
        weights[0] = 0.0  # whole blocks of zeros in front
        assert draw(weights, 0.0) == vocab_size - 1
    with pytest.raises(ValueError, match="probabilities"):
        draw(torch.tensor([0.5, math.nan]), 0.5)


def test_uniform_is_stateless_and_well_mixed():
    assert uniform(1, 2) == uniform(1, 2, 0)
    seeds = [-5, 0, 1, 2**63, 10**30]
    keys = [(s, p, k) for s in seeds for p in range(300) for k in range(3)]
    values = [uniform(*key) for key in keys]
    assert len(set(values)) == len(values)
    assert all(0.0 <= value < 1.0 for value in values)
    cells = Counter(int(value * 20) for value in values)
    assert chisquare([cells[i] for i in range(20)]).pvalue > 1e-3
    pairs = Counter((uniform(7, p) < 0.5, uniform(7, p, 1) < 0.5) for p in range(4000))
    assert chisquare(list(pairs.values())).pvalue > 1e-3
    follow = Counter((uniform(7, p) < 0.5, uniform(7, p + 1) < 0.5) for p in range(4000))
    assert chisquare(list(follow.values())).pvalue > 1e-3


def test_the_seed_decides():
    logits = random_logits(1).expand(64, -1)
    rows = [row(seed=11, position=p) for p in range(64)]
    again = SAMPLER.sample(logits, list(reversed(rows)))[::-1]
    first = SAMPLER.sample(logits, rows)
    assert first == again
    assert first != SAMPLER.sample(logits, [row(seed=12, position=p) for p in range(64)])
    assert len({done.token_id for done in first}) > 10
