"""SamplingParams: defaults, freezing, and one clear error per wrong field."""

import copy
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpa.engine.sampling_params import SamplingParams, SpeculateParams

TIERS = ("base", "middle", "top")
FILLED = SamplingParams(
    temperature=0.5,
    stop=["a", "b"],
    stop_token_ids=[4, 5],
    logit_bias={7: 1.5, "8": -100},
    seed=-3,
    max_tokens=None,
    speculate=SpeculateParams(draft_tier="base", length=2),
)


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.repetition_penalty) == (16, 0, 1.0)
    assert (params.logprobs, params.seed, params.tier) == (None, None, "auto")
    assert not params.is_greedy
    assert params.skip_special_tokens and params.allow_escalation and params.allow_degradation


def test_collections_are_copied_and_frozen():
    stops, biases = ["a"], {1: 2.0}
    params = SamplingParams(stop=stops, logit_bias=biases, stop_token_ids=[3])
    stops.append("b")
    biases[9] = 1.0
    assert params.stop == ("a",) and dict(params.logit_bias) == {1: 2.0}
    assert params.stop_token_ids == (3,)
    with pytest.raises(TypeError):
        params.logit_bias[1] = 0.0
    with pytest.raises(FrozenInstanceError):
        params.n = 2
    assert SamplingParams(stop="end").stop == ("end",)
    assert dict(FILLED.logit_bias) == {7: 1.5, 8: -100.0}  # JSON has only string keys


def test_equality_hash_copies():
    same = SamplingParams(**{name: getattr(FILLED, name) for name in FILLED.__dataclass_fields__})
    assert same == FILLED and hash(same) == hash(FILLED)
    assert replace(FILLED, logit_bias={7: 1.0}) != FILLED
    for twin in (pickle.loads(pickle.dumps(FILLED)), copy.deepcopy(FILLED), copy.copy(FILLED)):
        assert twin == FILLED and twin is not FILLED


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-6])
def test_greedy(temperature):
    assert SamplingParams(temperature=temperature, n=3).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


WRONG = {
    "n": [0, -1, True, 1.0, "1", None, 1025],
    "temperature": [float("nan"), -0.1, float("inf"), "1", None, True, 101, 10**400],
    "top_p": [0.0, 1.1, -1, float("nan"), None, True],
    "top_k": [-2, 1.5, None, False],
    "min_p": [-0.1, 1.1, float("nan"), None],
    "presence_penalty": [-2.1, 2.1, float("nan"), "0"],
    "frequency_penalty": [-2.1, 2.1, float("nan"), "0"],
    "repetition_penalty": [0.0, -1.0, float("nan"), float("inf"), None],
    "seed": [2**63, -(2**63) - 1, 1.0, True, "x"],
    "stop": [[""], "", [1], 3, None, {"a": 1}, b"x"],
    "stop_token_ids": [[-1], ["1"], [True], 3, "12", None],
    "include_stop_str_in_output": [1, None, "yes"],
    "ignore_eos": [0],
    "skip_special_tokens": [None],
    "max_tokens": [0, -1, True, 1.5, "4"],
    "min_tokens": [-1, 17, None, True],  # 17 is above max_tokens
    "logprobs": [-1, 21, True, 1.0],
    "prompt_logprobs": [-1, 21, False],
    "logit_bias": [{1: 101}, {1: float("nan")}, {1: None}, {-1: 0}, {"a": 0}, {True: 0}, [1], None],
    "tier": ["", -1, None, True, 1.0],
    "max_tier": ["", -1, True],
    "min_tier": ["", -1, True],
    "quality": [-0.1, 1.1, float("nan"), True, "0.5"],
    "allow_escalation": [1, None],
    "allow_degradation": ["no"],
    "timeout_s": [0, -1.0, float("nan"), float("inf"), True, "5"],
    "session_id": ["", 5],
    "speculate": [True, 3, {"draft_tier": 0}],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_a_wrong_value_names_its_field(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: .*must"):
        SamplingParams(**{name: value})


def test_every_field_has_a_wrong_value():
    assert set(WRONG) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "values"), {"draft_tier": ["", -1, None], "length": [0, 33, True, None]}.items()
)
def test_wrong_speculation(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^speculate\.{name}: "):
            SpeculateParams(**{name: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit_bias": {64: 1.0}}, "logit_bias: token id 64 must be in 0 .. 63"),
        ({"stop_token_ids": [99]}, "stop_token_ids: token id 99 must be in 0 .. 63"),
        ({"tier": "huge"}, "tier: 'huge' is not a tier"),
        ({"tier": 3}, "tier: 3 is not a tier"),
        ({"max_tier": "huge"}, "max_tier: 'huge' is not a tier"),
        ({"min_tier": 9}, "min_tier: 9 is not a tier"),
        ({"min_tier": "top", "max_tier": 1}, "min_tier: 'top' must not be above max_tier 1"),
        ({"speculate": SpeculateParams(draft_tier="x")}, "speculate.draft_tier: 'x' is not"),
        ({"speculate": SpeculateParams(draft_tier=2)}, "speculate.draft_tier: 2 must be below"),
    ],
)
def test_what_only_the_model_can_tell(wrong, message):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**wrong).check(64, TIERS)
    assert str(caught.value).startswith(message)


def test_check_accepts_what_fits():
    FILLED.check(9, TIERS)
    SamplingParams(tier="1", min_tier="base", max_tier=2).check(1, TIERS)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
            for name in SamplingParams.__dataclass_fields__
        },
    )
)
def test_any_scalars_are_accepted_or_refused_by_name(values):
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        assert str(error).split(":")[0] in values
    else:
        assert pickle.loads(pickle.dumps(params)) == params


def test_needs_no_torch():
    program = "import sys, dvpa.engine.sampling_params\nraise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
