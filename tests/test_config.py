"""The config: what it refuses, what it derives, and its round trips."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TIERS, YARN, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from dvpa.config import (
    DifficultyConfig,
    DvpaConfig,
    TierConfig,
    find_config,
    load_model_config,
    load_yaml,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"


def tiers_with(index: int, **changes: Any) -> dict[str, Any]:
    """The tiny tiers with one of them changed."""
    tiers = [dict(tier) for tier in TIERS]
    tiers[index].update(changes)
    return {"tiers": tiers}


def striped(*shares: int | None) -> dict[str, Any]:
    """Tiers that have so many experts of each group."""
    tiers = [
        {"name": f"t{i}", "experts_per_group": share, "top_k": 2, "topk_group": 4,
         "routed_scaling_factor": 1.0}
        for i, share in enumerate(shares)
    ]  # fmt: skip
    return {"pool": "striped", "tiers": tiers}


BAD = [
    ({"vocab_size": 0}, "vocab_size: 0 must be a positive whole number"),
    ({"hidden_size": 32.0}, "hidden_size: 32.0 must be a positive"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers: '3' must be a positive"),
    ({"moe_intermediate_size": True}, "moe_intermediate_size: True must be a positive"),
    ({"kv_lora_rank": -1}, "kv_lora_rank: -1"),
    ({"max_position_embeddings": None}, "max_position_embeddings: None"),
    ({"q_lora_rank": 0}, "q_lora_rank: 0 must be null or positive"),
    ({"q_lora_rank": 2.5}, "q_lora_rank: 2.5"),
    ({"n_shared_experts": -1}, "n_shared_experts: -1 must be a whole number, 0 or more"),
    ({"n_shared_experts": 1.5}, "n_shared_experts: 1.5"),
    ({"first_k_dense_replace": 4}, r"first_k_dense_replace: 4 must be in 0 \.\. .* = 3"),
    ({"first_k_dense_replace": 3}, "first_k_dense_replace: 3 leaves no layer with experts"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace: -1"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: 7 must be even"),
    ({"num_key_value_heads": 1}, "num_key_value_heads: 1 must be num_attention_heads = 2"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob: 'yes' must be true or false"),
    ({"rope_interleave": 1}, "rope_interleave: 1"),
    ({"attention_bias": None}, "attention_bias: None"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings: 0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: '1e-6' must be a number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
    ({"initializer_range": -0.1}, "initializer_range: -0.1"),
    ({"attention_dropout": 1.5}, "attention_dropout: 1.5"),
    ({"hidden_act": "gelu"}, "hidden_act: 'gelu' must be 'silu'"),
    ({"bos_token_id": -1}, r"bos_token_id: -1 must be null or a token in 0 \.\. 63"),
    ({"eos_token_id": [2, 64]}, r"eos_token_id: \[2, 64\] must be"),
    ({"pad_token_id": 64}, "pad_token_id: 64"),
    ({"pad_token_id": [0]}, r"pad_token_id: \[0\]"),
    ({"rope_parameters": 3}, "rope_parameters: 3 must be null or a mapping"),
    ({"rope_parameters": {"rope_type": "foo"}}, "rope_parameters.rope_type: 'foo' must be in"),
    ({"rope_parameters": {**YARN, "factor": 0}}, "rope_parameters.factor: 0 must be"),
    ({"n_routed_experts": 18}, "n_routed_experts: 18 must be a whole number of groups"),
    ({"n_routed_experts": 4}, "n_group: 4 leaves 1 expert per group"),
    ({"num_experts_per_tok": 4}, "num_experts_per_tok: 4 must equal the top tier's top_k, 5"),
    ({"topk_group": 4}, "topk_group: 4 must equal the top tier's"),
    ({"routed_scaling_factor": 1.0}, "routed_scaling_factor: 1.0 must equal"),
    ({"pool": "middle"}, "pool: 'middle' must be one of prefix, striped"),
    ({"scoring_func": "relu"}, "scoring_func: 'relu' must be one of sigmoid, softmax"),
    ({"topk_method": "greedy"}, "topk_method: 'greedy' must be one of noaux_tc, group_limited"),
    ({"tiers": []}, r"tiers: \[\] must be a non-empty list"),
    ({"tiers": {"a": 1}}, "tiers: .* must be a non-empty list"),
    ({"tiers": [3]}, r"tiers\[0\]: 3 must be a mapping"),
    (tiers_with(0, size=3), r"tiers\[0\].size: unknown key; allowed: name, num_groups"),
    (tiers_with(0, experts_per_group=2), r"tiers\[0\].experts_per_group: 2 is for pool: striped"),
    ({"pool": "striped"}, r"tiers\[0\].num_groups: 1 must be n_group = 4 \(or be left out\)"),
    (striped(1, 2, 4), r"tiers\[0\].experts_per_group: 1 must be in 2 \.\. 4"),
    (striped(2, 2, 4), r"tiers\[1\].experts_per_group: 2 must be in 3 \.\. 4"),
    (striped(2, 3), r"tiers\[1\].experts_per_group: 3 must be all of a group's 4"),
    (striped(2, None), r"tiers\[1\].experts_per_group: None must be in 3 \.\. 4"),
    ({"tiers": [{"name": "a"}]}, r"tiers\[0\].num_groups: missing; needed"),
    (tiers_with(1, top_k=2.5), r"tiers\[1\].top_k: 2.5 must be of type int"),
    (tiers_with(1, top_k=True), r"tiers\[1\].top_k: True must be of type int"),
    (tiers_with(1, name=7), r"tiers\[1\].name: 7 must be of type str"),
    (tiers_with(1, name="auto"), r"tiers\[1\].name: 'auto' must be a word"),
    (tiers_with(1, name="3"), r"tiers\[1\].name: '3' must be a word"),
    (tiers_with(1, name="base"), "tiers: names must differ, got base, base, top"),
    (tiers_with(0, num_groups=0), r"tiers\[0\].num_groups: 0 must be in 1 \.\. 4"),
    (tiers_with(1, num_groups=1), r"tiers\[1\].num_groups: 1 must be in 2 \.\. 4"),
    (tiers_with(2, num_groups=5), r"tiers\[2\].num_groups: 5 must be in 3 \.\. 4"),
    (tiers_with(2, num_groups=3), r"tiers\[2\].num_groups: 3 must be n_group = 4"),
    (tiers_with(1, topk_group=3), r"tiers\[1\].topk_group: 3 must be in 1 \.\. 2"),
    (tiers_with(0, top_k=5), r"tiers\[0\].top_k: 5 must be in 1 \.\. 4"),
    (tiers_with(1, top_k=5), r"tiers\[1\].top_k: 5 must be in 1 \.\. 4 \(its pool has 8 experts"),
    (tiers_with(1, top_k=1), r"tiers\[1\].top_k: 1 must not be below the tier before it"),
    (tiers_with(1, routed_scaling_factor=0), r"tiers\[1\].routed_scaling_factor: 0.0 must be pos"),
    (tiers_with(1, routed_scaling_factor="x"), r"tiers\[1\].routed_scaling_factor: 'x' must be of"),
    ({"difficulty": 3}, "difficulty: 3 must be a mapping"),
    ({"difficulty": {"probe_layer": 2}}, "difficulty.hidden_size: missing"),
    ({"difficulty": {"probe_layer": 0, "hidden_size": 8}}, r"probe_layer: 0 must be in 1 \.\. 3"),
    ({"difficulty": {"probe_layer": 4, "hidden_size": 8}}, r"probe_layer: 4 must be in 1 \.\. 3"),
    ({"difficulty": {"probe_layer": 1, "hidden_size": 0}}, "difficulty.hidden_size"),
    ({"difficulty": {"probe_layer": 1, "hidden_size": 8, "x": 1}}, "difficulty.x: unknown key"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c)[:60] for c, _ in BAD])
def test_a_bad_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_derived_values() -> None:
    config = tiny_config()
    assert config.num_tiers == 3
    assert config.top_tier == 2
    assert config.tier_names == ["base", "middle", "top"]
    assert config.group_size == 4
    assert [config.pool_size(tier) for tier in range(3)] == [4, 8, 16]
    assert (config.num_experts_per_tok, config.topk_group) == (5, 3)
    assert config.routed_scaling_factor == 2.2
    assert config.qk_head_dim == 20
    assert isinstance(config.tiers[0], TierConfig)
    assert isinstance(config.difficulty, DifficultyConfig)


def test_without_tiers_it_is_an_ordinary_model() -> None:
    config = tiny_config(
        tiers=None, num_experts_per_tok=6, topk_group=2, routed_scaling_factor=2.5, difficulty=None
    )
    assert config.tiers == [TierConfig("top", 4, 6, 2, 2.5)]


@pytest.mark.parametrize(
    ("given_name", "index"), [("base", 0), ("top", 2), ("1", 1), (2, 2), (0, 0)]
)
def test_tier_index(given_name: int | str, index: int) -> None:
    assert tiny_config().tier_index(given_name) == index


@pytest.mark.parametrize("unknown", ["huge", "", "-1", "3", 3, -1, True, 1.0, None])
def test_an_unknown_tier_names_the_known_ones(unknown: Any) -> None:
    with pytest.raises(ValueError, match=r"tier: .*0=base, 1=middle, 2=top"):
        tiny_config().tier_index(unknown)


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN, "q_lora_rank": 12}])
def test_json_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "dvpa"
    assert data["tiers"] == TIERS
    assert data["difficulty"] == {"probe_layer": 2, "hidden_size": 16}
    loaded = DvpaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.tiers == config.tiers
    assert loaded.difficulty == config.difficulty


def test_a_bad_value_in_config_json_is_named(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    data["tiers"][1]["top_k"] = 99
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tiers\[1\].top_k: 99"):
        DvpaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("num_tiers", [1, 2, 3])
def test_truncate(num_tiers: int) -> None:
    config = tiny_config()
    cut = config.truncate(num_tiers)
    assert cut.tiers == config.tiers[:num_tiers]
    assert cut.n_group == TIERS[num_tiers - 1]["num_groups"]
    assert cut.n_routed_experts == config.pool_size(num_tiers - 1)
    assert cut.group_size == config.group_size
    assert cut.num_experts_per_tok == TIERS[num_tiers - 1]["top_k"]
    assert cut.routed_scaling_factor == TIERS[num_tiers - 1]["routed_scaling_factor"]
    assert cut.difficulty is None
    same = ("hidden_size", "vocab_size", "rope_parameters", "kv_lora_rank", "initializer_range")
    assert all(getattr(cut, name) == getattr(config, name) for name in same)
    assert config.n_routed_experts == 16  # the original is untouched


@pytest.mark.parametrize("num_tiers", [0, 4, -1])
def test_truncate_out_of_range(num_tiers: int) -> None:
    with pytest.raises(ValueError, match=r"num_tiers: .* must be in 1 \.\. 3"):
        tiny_config().truncate(num_tiers)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_model_parses_and_explains_its_keys(path: Path) -> None:
    config = load_model_config(path)
    assert config.num_tiers >= 1
    for line in path.read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            assert "#" in line, f"{path.name}: no comment on {line!r}"


@given(st.sampled_from(["tier", "hiddensize", "n_experts", "model_type", "use_cache", "42"]))
def test_an_unknown_yaml_key_is_refused(key: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        path.write_text(f"vocab_size: 64\n'{key}': 1\n")
        with pytest.raises(ValueError, match=rf"model.yaml: {key}: unknown key; allowed: .*tiers"):
            load_model_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", "not valid YAML: .*line 2"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("hidden_size: -4\n", "model.yaml: hidden_size: -4"),
        ("rms_norm_eps: 1e-6\n", "model.yaml: rms_norm_eps: '1e-6' must be a number"),
        ("7: 3\n", "model.yaml: 7: unknown key"),
    ],
)
def test_bad_yaml_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model_config(path)


def test_yaml_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_yaml(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/nothing.yaml: no such"):
        load_model_config("nowhere/nothing.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml: no such file"):
        load_yaml("nothing.yaml")


@pytest.mark.parametrize("name", ["model/pico.yaml", "configs/model/pico.yaml"])
def test_configs_are_found_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name).samefile(CONFIGS / "pico.yaml")


def test_a_striped_pool_is_a_part_of_every_group() -> None:
    config = tiny_config(**striped(2, 4))
    assert [config.pool_size(tier) for tier in range(2)] == [8, 16]
    assert (config.unit_size, config.num_units, config.tier_units(0)) == (4, 4, 2)
    data = config.to_dict()
    assert [tier["experts_per_group"] for tier in data["tiers"]] == [2, 4]
    assert not any("num_groups" in tier for tier in data["tiers"])
    assert DvpaConfig.from_dict(data).tiers == config.tiers
    small = config.truncate(1)
    assert (small.n_group, small.n_routed_experts, small.group_size) == (4, 8, 2)
    alone = DvpaConfig(pool="striped", n_routed_experts=16, n_group=4, num_experts_per_tok=2)
    assert alone.pool_size(0) == 16
