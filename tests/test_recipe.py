"""Recipes: what is accepted, what is refused and how it is named; classes of tensors."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dvpa.architecture import load_yaml
from dvpa.checkpoint.recipe import load_recipe, parse_recipe
from dvpa.checkpoint.tensor_class import CLASSES, place_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "assemble"
VALID: dict[str, Any] = {
    "parents": {"v3": "a", "r1": "b"},
    "base": "v3",
    "rules": [
        {"match": "routed_experts", "layers": "1-2", "experts": "0-63", "lambda": {"r1": 1.0}},
        {"match": "all", "lambda": {"v3": 0.7, "r1": 0.3}},
    ],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """A copy of VALID with one key set (None: removed)."""
    data = deepcopy(VALID)
    node: Any = data
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in parents:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return data


def test_a_recipe_of_the_schema() -> None:
    recipe = parse_recipe(
        {**VALID, "delta": 0.25, "expert_delta": 0.5}, {"r1": "elsewhere"}, "mine"
    )
    assert recipe.parents == {"v3": Path("a"), "r1": Path("elsewhere")}
    first, last = recipe.rules
    assert (first.shares, last.shares) == ((0.0, 1.0), (0.7, 0.3))
    assert (first.layers, first.experts) == (range(1, 3), range(0, 64))
    assert (first.delta, first.expert_delta, recipe.base_index) == (0.25, 0.5, 0)
    parse_recipe(changed("rules.0.delta", 0.1))
    assert parse_recipe({**VALID, "delta": 0.2, "rules": [
        {"match": "mtp", "delta": 0.0, "lambda": {"v3": 1}}, VALID["rules"][1]
    ]}).rules[0].delta == 0.0  # fmt: skip


BAD = [
    ("parents", {"v3": "a"}, "parents: must map two names or more"),
    ("parents.r1", 3, r"parents.r1: 3 must be a folder"),
    ("parents", None, "parents: must map two"),
    ("base", "r2", "base: 'r2' must be one of v3, r1"),
    ("base", ["v3"], "base: "),
    ("delta", -1, "delta: -1 must be a number, 0 or more"),
    ("delta", "1e-3", "delta: '1e-3' must be a number"),
    ("expert_delta", float("nan"), "expert_delta: nan"),
    ("norm", "l2", "norm: unknown key; allowed: parents, base, delta"),
    ("rules", [], "rules: must be a list"),
    ("rules", {"match": "all"}, "rules: must be a list"),
    ("rules.0", "all", r"rules\[0\]: 'all' must be a mapping"),
    ("rules.0.match", "expert", r"rules\[0\].match: 'expert' must be one of all, routed_experts"),
    ("rules.0.match", ["all"], r"rules\[0\].match: \['all'\]"),
    ("rules.0.lamda", {"v3": 1}, r"rules\[0\].lamda: unknown key"),
    ("rules.0.lambda", None, r"rules\[0\].lambda: None must map parents to their shares"),
    ("rules.0.lambda", 0.5, r"rules\[0\].lambda: 0.5 must map"),
    ("rules.0.lambda", {"v3": 0.5, "r1": 0.4}, r"rules\[0\].lambda: sums to 0.9, must sum to 1"),
    ("rules.0.lambda", {"v3": 1.5, "r1": -0.5}, r"rules\[0\].lambda.v3: 1.5 must be .* 0 .. 1"),
    ("rules.0.lambda", {"v3": True}, r"rules\[0\].lambda.v3: True must be a number"),
    ("rules.0.lambda", {"v4": 1.0}, r"rules\[0\].lambda.v4: unknown parent; known: v3, r1"),
    ("rules.0.layers", "10..60", r"rules\[0\].layers: '10..60' must be a number or FIRST-LAST"),
    ("rules.0.layers", "9-2", r"rules\[0\].layers: '9-2'"),
    ("rules.0.layers", -1, r"rules\[0\].layers: -1"),
    ("rules.0.experts", True, r"rules\[0\].experts: True"),
    ("rules.0.regex", "a(", r"rules\[0\].regex: 'a\(' is no regular expression"),
    ("rules.0.regex", 5, r"rules\[0\].regex: 5"),
    ("rules.1.match", "norms", r"rules\[1\]: the last rule must match everything"),
    ("rules.1.layers", 3, r"rules\[1\]: the last rule must match everything"),
    ("rules.1.regex", ".", r"rules\[1\]: the last rule must match everything"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_what_is_wrong_is_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    data = changed(path, value)
    with pytest.raises(ValueError, match=message):
        parse_recipe(data)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: {message}"):
        load_recipe(file)


def test_an_unknown_parent_cannot_be_placed() -> None:
    with pytest.raises(ValueError, match=r"parents.r3: unknown parent; the recipe names v3, r1"):
        parse_recipe(VALID, {"r3": "x"})


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["all", "v3", "1-2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["parents", "base", "rules", "match", "lambda", "v3", "r1", "delta"]), inner
    ),
    max_leaves=15,
))  # fmt: skip
def test_any_yaml_is_a_recipe_or_a_value_error(data: Any) -> None:
    try:
        parse_recipe(data if isinstance(data, dict) else {"rules": data, **VALID, "base": data})
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(f"assemble/{path.name}")
    assert recipe.name == path.stem
    assert list(recipe.parents) == list(load_yaml(path)["parents"])


def test_chimera_takes_routed_experts_alone() -> None:
    recipe = load_recipe("assemble/r1t-chimera.yaml")
    assert recipe.base == "v3"
    for name, taken in {
        "model.layers.5.mlp.experts.17.up_proj.weight": "r1",
        "model.layers.5.mlp.shared_experts.up_proj.weight": "v3",
        "model.layers.5.mlp.gate.weight": "v3",
        "model.layers.61.mlp.experts.17.up_proj.weight": "v3",  # multi-token prediction
        "lm_head.weight": "v3",
    }.items():
        rule = recipe.rules[recipe.rule_of(name, place_of(name, 61))]
        assert rule.shares[list(recipe.parents).index(taken)] == 1.0, name


PLACES = {
    "model.embed_tokens.weight": ("embeddings", None, None),
    "lm_head.weight": ("embeddings", None, None),
    "model.norm.weight": ("norms", None, None),
    "model.layers.0.mlp.gate_proj.weight": ("dense_mlp", 0, None),
    "model.layers.3.input_layernorm.weight": ("norms", 3, None),
    "model.layers.3.self_attn.q_a_layernorm.weight": ("norms", 3, None),
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": ("attention", 3, None),
    "model.layers.3.self_attn.q_proj.bias": ("attention", 3, None),
    "model.layers.3.mlp.gate.weight": ("router", 3, None),
    "model.layers.3.mlp.gate.e_score_correction_bias": ("router", 3, None),
    "model.layers.3.mlp.gate.tier_bias": ("router", 3, None),
    "model.layers.3.mlp.experts.255.gate_proj.weight": ("routed_experts", 3, 255),
    "model.layers.3.mlp.experts.gate_up_proj": ("routed_experts", 3, None),
    "model.layers.3.mlp.shared_experts.down_proj.weight": ("shared_experts", 3, None),
    "model.layers.3.mlp.shared_expert.down_proj.weight": ("shared_experts", 3, None),
    "model.layers.3.mlp.shared_expert_gate.weight": ("shared_experts", 3, None),
    "model.layers.3.block_sparse_moe.gate.weight": ("router", 3, None),
    "model.layers.3.block_sparse_moe.experts.7.w1.weight": ("routed_experts", 3, 7),
    "model.layers.61.mlp.experts.0.up_proj.weight": ("mtp", 61, 0),
    "model.layers.61.enorm.weight": ("mtp", 61, None),
    "model.layers.61.eh_proj.weight": ("mtp", 61, None),
    "mtp.layers.0.mlp.gate.weight": ("mtp", 0, None),
    "difficulty_head.norm.weight": ("difficulty_head", None, None),
    "model.layers.3.rotary_emb.inv_freq": ("other", 3, None),
    "what.is.this": ("other", None, None),
}


@pytest.mark.parametrize("name", list(PLACES))
def test_every_class(name: str) -> None:
    place = place_of(name, 61)
    assert (place.tensor_class, place.layer, place.expert) == PLACES[name]
    assert place.tensor_class in CLASSES
