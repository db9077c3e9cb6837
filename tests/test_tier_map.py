"""TierMap: the rule, its JSON form and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.tiers.tier_map import NEVER, TierMap

NAMES, COSTS = ("small", "middle", "large"), (1e5, 2.5e5, 6e5)
# Decreasing in d; the middle tier is inverted against the small one below d = 0.1.
CALIBRATION = (
    ((0.1, 0.3, 0.9), (1.0, 0.6, 0.0)),
    ((0.1, 0.5, 0.9), (0.9, 0.8, 0.05)),
    ((0.2, 0.7, 0.95), (1.0, 0.9, 0.05)),
)
GAIN = TierMap("gain", NAMES, COSTS, 2, gain_lambda=0.3, calibration=CALIBRATION)
THRESHOLD = TierMap("threshold", NAMES, COSTS, 2, (0.25, 0.5), 0.9, calibration=CALIBRATION)
unit = st.floats(0.0, 1.0)


@st.composite
def tier_maps(draw: st.DrawFn) -> TierMap:
    """Any valid fitted map."""
    num_tiers = draw(st.integers(1, 4))
    steps = draw(st.lists(st.floats(1e3, 1e10), min_size=num_tiers, max_size=num_tiers))
    curves = []
    for _ in range(num_tiers):
        x = sorted(draw(st.sets(unit, min_size=1, max_size=6)))
        y = sorted((draw(unit) for _ in x), reverse=True)
        curves.append((tuple(x), tuple(y)))
    kind = draw(st.sampled_from(["gain", "threshold"]))
    cuts = draw(st.lists(st.floats(-1.0, 1.0), min_size=num_tiers - 1, max_size=num_tiers - 1))
    guard = draw(st.sampled_from([None, {"alpha": 0.1, "delta": 0.05, "cuts": cuts}]))
    extra = {"guard": guard, "budget": {"fraction": draw(unit)}, "calibration": tuple(curves)}
    names, costs = tuple(f"t{i}" for i in range(num_tiers)), tuple(np.cumsum(steps).tolist())
    if kind == "gain":
        return TierMap(kind, names, costs, 0, gain_lambda=draw(st.floats(0.0, 1e6)), **extra)
    thresholds = tuple(sorted(draw(st.floats(0.0, NEVER)) for _ in range(num_tiers - 1)))
    return TierMap(kind, names, costs, 0, thresholds, draw(st.none() | unit), **extra)


def plain_tier(tier_map: TierMap, d: float) -> int:
    """The rule as the contract words it, one request at a time in plain Python."""
    success = []
    for x, y in tier_map.calibration:
        value = y[0] if d < x[0] else y[-1]
        for i in range(len(x) - 1):
            if x[i] <= d < x[i + 1]:
                value = y[i] + (y[i + 1] - y[i]) * ((d - x[i]) / (x[i + 1] - x[i]))
                value = min(max(value, y[i + 1]), y[i])
        success.append(max([value, *success[-1:]]))
    top = tier_map.num_tiers - 1
    cuts = tier_map.guard["cuts"] if tier_map.guard else [2.0] * top
    allowed = [success[-1] - success[t] <= cuts[t] for t in range(top)] + [True]
    if tier_map.kind == "gain":
        best = None
        for t in range(top + 1):
            value = success[t] - tier_map.gain_lambda * (tier_map.costs[t] / tier_map.costs[-1])
            if allowed[t] and (best is None or value > best[0]):
                best = (value, t)
        return best[1]
    tier = sum(threshold <= d for threshold in tier_map.thresholds)
    if tier_map.upper_cut is not None and d > tier_map.upper_cut:
        tier = 0
    while not allowed[tier]:
        tier += 1
    return tier


@given(tier_maps(), st.lists(unit, min_size=1, max_size=20))
def test_vectorised_and_single_and_plain_rule_agree(tier_map, difficulties):
    tiers = tier_map.tiers(np.array(difficulties)).tolist()
    assert tiers == [tier_map.tier(d) for d in difficulties]
    assert tiers == [plain_tier(tier_map, d) for d in difficulties]


@given(tier_maps(), st.lists(unit, min_size=2, max_size=20))
def test_success_is_monotone_in_difficulty_and_tier(tier_map, difficulties):
    success = tier_map.success(np.sort(difficulties))
    assert success.shape == (len(difficulties), tier_map.num_tiers)
    assert (np.diff(success, axis=0) <= 0).all()
    assert (np.diff(success, axis=1) >= 0).all()
    assert tier_map.success_by_tier(max(difficulties)) == tuple(success[-1])


@given(tier_maps())
def test_json_round_trip_keeps_every_bit(tier_map):
    text = tier_map.to_json()
    again = TierMap.from_json(text)
    assert again == tier_map
    assert again.to_json() == text


def test_threshold_rule_and_upper_cut():
    d = np.array([0.0, 0.2499, 0.25, 0.5, 0.9, 0.9001, 1.0])
    assert THRESHOLD.tiers(d).tolist() == [0, 0, 1, 2, 2, 0, 0]
    assert replace(THRESHOLD, upper_cut=None).tiers(d).tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert replace(THRESHOLD, thresholds=(NEVER, NEVER)).tier(1.0) == 0


def test_gain_map_sends_easy_and_hopeless_requests_to_base():
    assert GAIN.tier(0.0) == 0
    assert GAIN.tier(0.6) == 2
    assert GAIN.tier(1.0) == 0
    assert replace(GAIN, gain_lambda=1e9).tiers(np.linspace(0, 1, 50)).max() == 0


def test_gain_ties_go_to_the_cheaper_tier():
    flat = tuple(((0.5,), (0.7,)) for _ in NAMES)
    assert replace(GAIN, calibration=flat, gain_lambda=0.0).tier(0.3) == 0


def test_guard_raises_a_tier_whose_expected_loss_is_too_large():
    d = 0.6  # success about 0.3, 0.61, 0.92: losses 0.62 and 0.31
    guard = {"alpha": 0.1, "delta": 0.05, "cuts": [0.1, 0.4]}
    cheap = replace(GAIN, gain_lambda=1e9)
    assert cheap.tier(d) == 0
    assert replace(cheap, guard=guard).tier(d) == 1
    assert replace(cheap, guard={**guard, "cuts": [-1.0, -1.0]}).tier(d) == 2
    low = replace(THRESHOLD, thresholds=(NEVER, NEVER), upper_cut=None)
    assert replace(low, guard=guard).tier(d) == 1


def test_untrained_map_only_falls_back():
    tier_map = TierMap.untrained(NAMES, COSTS)
    assert not tier_map.is_fitted
    assert tier_map.tiers(np.array([0.0, 1.0])).tolist() == [2, 2]
    assert tier_map.success_by_tier(0.5) == ()
    assert TierMap.from_json(tier_map.to_json()) == tier_map


@pytest.mark.parametrize("d", [float("nan"), -1e-9, 1.0 + 1e-9, float("inf")])
@pytest.mark.parametrize("tier_map", [GAIN, THRESHOLD, TierMap.untrained(NAMES, COSTS)])
def test_unusable_difficulty_is_refused(tier_map, d):
    with pytest.raises(ValueError, match="difficulty"):
        tier_map.tier(d)


BAD_FIELDS = [
    ("kind", "spline", "kind.*spline.*threshold, gain"),
    ("version", 2, "version"),
    ("version", True, "version"),
    ("tier_names", ["a", "a", "b"], "tier_names"),
    ("tier_names", [], "tier_names"),
    ("tier_names", "abc", "tier_names"),
    ("tier_names", [["x"], "b", "c"], "tier_names"),
    ("costs", [1.0, 2.0], "costs.*length 3"),
    ("costs", [3.0, 2.0, 4.0], "costs.*increasing"),
    ("costs", [0.0, 2.0, 4.0], "costs"),
    ("costs", [1.0, 2.0, 10**400], "costs"),
    ("costs", [1.0, "2", 3.0], "costs"),
    ("default_tier", 3, "default_tier.*0 to 2"),
    ("default_tier", 1.0, "default_tier"),
    ("default_tier", False, "default_tier"),
    ("thresholds", [0.5], "thresholds.*length 2"),
    ("thresholds", [0.5, 0.2], "thresholds.*order"),
    ("thresholds", [0.5, -0.1], "thresholds"),
    ("thresholds", None, "thresholds"),
    ("upper_cut", 1.5, "upper_cut"),
    ("upper_cut", "high", "upper_cut"),
    ("gain_lambda", 0.5, "gain_lambda"),
    ("calibration", [[[0.5], [0.5]]], "calibration.*3 tiers"),
    ("calibration", [[[0.5], [0.5]]] * 2 + [7], r"calibration\[2\]"),
    ("calibration", [[[0.5], [0.5]]] * 2 + [[1, 2]], r"calibration\[2\]"),
    ("calibration", [[[0.5, 0.4], [0.5, 0.4]]] * 3, r"calibration\[0\] x"),
    ("calibration", [[[0.4, 0.5], [0.4, 0.5]]] * 3, r"calibration\[0\] y"),
    ("calibration", [[[0.4, 0.5], [0.4]]] * 3, "length 2"),
    ("calibration", [[[], []]] * 3, "length 1"),
    ("guard", {"alpha": 0.1, "delta": 0.05}, "guard.cuts"),
    ("guard", {"alpha": 0.1, "delta": 0.05, "cuts": [0.1]}, "guard.cuts"),
    ("guard", {"alpha": 2, "delta": 0.05, "cuts": [0.1, 0.1]}, "guard.alpha"),
    ("budget", [1], "budget"),
    ("statistics", 3, "statistics"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_wrong_field_is_named(field, value, message):
    content = json.loads(THRESHOLD.to_json())
    content[field] = value
    with pytest.raises(ValueError, match=message):
        TierMap.from_json(json.dumps(content))


def test_missing_and_unknown_fields_are_named():
    content = json.loads(GAIN.to_json())
    for field in [f.name for f in fields(TierMap)] + ["version"]:
        with pytest.raises(ValueError, match=rf"missing field {field}\b"):
            TierMap.from_json(json.dumps({k: v for k, v in content.items() if k != field}))
    with pytest.raises(ValueError, match=r"unknown field 'threshold'; allowed: .*thresholds"):
        TierMap.from_json(json.dumps({**content, "threshold": [1]}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "NaN",
        "[" * 100_000,
        b"\xff\xfe\x00",
        b"\x80",
        '{"costs": NaN}',
        "1" * 9999,
    ],
)
def test_not_a_tier_map_is_one_value_error(text):
    with pytest.raises(ValueError, match="tier map"):
        TierMap.from_json(text)


def test_nan_in_a_file_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        TierMap.from_json(GAIN.to_json().replace("0.3", "NaN"))
    with pytest.raises(ValueError, match="statistics"):
        replace(GAIN, statistics={"quality": float("nan")})


@settings(max_examples=200)
@given(st.data())
def test_damaged_file_loads_or_raises_value_error(data):
    text = THRESHOLD.to_json().encode()
    at = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 10))
    damaged = text[:at] + data.draw(st.binary(max_size=4)) + text[at + length :]
    try:
        tier_map = TierMap.from_json(damaged)
    except ValueError:
        return
    assert 0 <= tier_map.tier(0.5) < tier_map.num_tiers


def test_save_is_atomic_and_load_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "tier_map.json"
    GAIN.save(path)
    assert TierMap.load(path) == GAIN
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            THRESHOLD.save(path)
    assert TierMap.load(path) == GAIN
    assert list(tmp_path.iterdir()) == [path]
    with path.open() as reader:  # opened before the save: keeps seeing the old file, whole
        THRESHOLD.save(path)
        assert TierMap.from_json(reader.read()) == GAIN
    assert TierMap.load(path) == THRESHOLD
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tier_map\.json: tier map: missing field"):
        TierMap.load(path)
    with pytest.raises(FileNotFoundError):
        TierMap.load(tmp_path / "absent.json")


def test_serving_imports_neither_torch_nor_the_fitting_libraries():
    code = (
        "import sys, dvpa.tiers\n"
        "loaded = {'torch', 'transformers', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "dvpa.tiers.fit_tier_map\n"
        "assert 'torch' not in sys.modules and 'sklearn' in sys.modules\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
