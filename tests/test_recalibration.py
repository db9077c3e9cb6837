"""A server's log read back, and a tier map for the traffic in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_config
from request_world import NAMES, Requests, draw

from dvpa.evaluate.calibration import CalibrationOptions
from dvpa.evaluate.recalibration import MIN_SHADOWS, logged_costs, recalibrate
from dvpa.evaluate.server_logs import ServerLog, read_server_logs
from dvpa.pricing import price
from dvpa.tiers.budget import Budget
from dvpa.tiers.calibrate import fit_tier_map
from dvpa.tiers.record import ShadowRecord
from dvpa.tiers.tier_map import TierMap

PRICE = price(tiny_config())
ACTIVATED = [float(tier.activated_params) for tier in PRICE.tiers]
HALF = (ACTIVATED[0] + ACTIVATED[-1]) / 2
BUDGET = CalibrationOptions(Budget(mean_activated=HALF))


def old_map(**options: Any) -> TierMap:
    """Calibrated on the usual mix."""
    fit, calibrate = draw(1, 1500).split, draw(2, 1500).split
    return fit_tier_map(fit, calibrate, ACTIVATED, Budget(mean_activated=HALF), NAMES, **options)


def request_line(number: int, difficulty: float | None, tier: int, /, **changes: Any) -> str:
    """A line of the access log; `changes` to any field."""
    row = {
        "ts": 1.0, "request_id": f"r{number}", "endpoint": "/v1/completions", "status": 200,
        "tier": tier, "tier_name": NAMES[tier], "difficulty": difficulty, "prompt_tokens": 9,
        "completion_tokens": 4, "queue_ms": 1.0, "total_ms": 5.0 + tier, "flops": 1.0,
    }  # fmt: skip
    return json.dumps({**row, **changes})


def write_log(
    path: Path, requests: Requests, tier_map: TierMap, shadows: int = 0, **changes: Any
) -> Path:
    """What a server with this map would have written, among other lines."""
    split = requests.split
    tiers = tier_map.tiers(split.difficulty)
    lines = ["2026-01-01 WARNING dvpa.server: draining", "{not json", '["an array"]']
    for number, (difficulty, tier) in enumerate(zip(split.difficulty, tiers, strict=True)):
        lines.append(request_line(number, float(difficulty), int(tier), **changes))
        if number < shadows:
            agreement = tuple((split.quality[number] == split.quality[number, -1]).astype(float))
            nll = tuple(1.0 - 0.3 * split.quality[number])
            record = ShadowRecord(f"r{number}", float(difficulty), 9, 4, agreement, nll)
            lines.append(json.dumps({"ts": 1.0, **record.to_dict()}))
    lines.append(json.dumps({"ts": 1.0, "endpoint": "/v1/completions", "status": 429}))
    lines.append(request_line(10**6, None, 2))  # a client named the tier
    path.write_text("\n".join(lines) + "\n")
    return path


def spent(tier_map: TierMap, requests: Requests) -> float:
    return float(np.asarray(ACTIVATED)[tier_map.tiers(requests.split.difficulty)].mean())


def test_a_log_is_read_back(tmp_path: Path) -> None:
    requests, tier_map = draw(3, 40), old_map()
    log = read_server_logs([write_log(tmp_path / "a.log", requests, tier_map, shadows=7)], 3)
    np.testing.assert_allclose(log.difficulty, requests.split.difficulty)
    np.testing.assert_array_equal(log.tier, tier_map.tiers(requests.split.difficulty))
    assert (len(log), log.num_unscored, log.num_other) == (40, 1, 4)
    assert set(log.prompt_tokens) == {9} and set(log.tokens) == {12}
    np.testing.assert_allclose(log.ms, 4.0 + log.tier)
    assert log.agreement.shape == log.nll.shape == (7, 3)
    np.testing.assert_allclose(log.shadow_difficulty, log.difficulty[:7])
    quality = log.shadow_quality(by_nll=True)
    np.testing.assert_allclose(quality, np.exp(-np.maximum(log.nll - log.nll[:, -1:], 0)))
    assert (log.shadow_quality(by_nll=False) == log.agreement).all()


def test_several_logs_and_only_the_newest(tmp_path: Path) -> None:
    tier_map = old_map()
    paths = [
        write_log(tmp_path / f"{seed}.log", draw(seed, 40), tier_map, shadows=7) for seed in (3, 4)
    ]
    assert len(read_server_logs(paths, 3)) == 80
    newest = read_server_logs(paths, 3, last=36)
    np.testing.assert_allclose(newest.difficulty, draw(4, 40).split.difficulty[4:])
    assert len(newest.shadow_difficulty) == 3 + 1  # those after the first of them
    with pytest.raises(ValueError, match="last: 0"):
        read_server_logs(paths, 3, last=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tier": 3}, r":4: tier: 3 is not from this checkpoint, of 3 tiers"),
        ({"difficulty": 1.5}, ":4: difficulty: 1.5"),
        ({"difficulty": "high"}, ":4: difficulty: high"),
        ({"prompt_tokens": -1}, ":4: prompt_tokens: -1"),
        ({"total_ms": None}, ":4: total_ms: None"),
    ],
)
def test_lines_of_another_checkpoint_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_log(tmp_path / "a.log", draw(3, 5), old_map(), **changes)
    with pytest.raises(ValueError, match=message):
        read_server_logs([path], 3)


def test_a_log_without_routed_requests_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("no request\n")
    with pytest.raises(ValueError, match=r"a\.log: no request that the policy routed \(1 other"):
        read_server_logs([path], 3)
    with pytest.raises(FileNotFoundError):
        read_server_logs([tmp_path / "nowhere.log"], 3)


@pytest.mark.parametrize("kind", ["gain", "threshold"])
@pytest.mark.parametrize("shadows", [0, 1000])
def test_the_budget_is_restored_after_the_mix_has_changed(
    tmp_path: Path, kind: str, shadows: int
) -> None:
    tier_map = old_map(kind=kind)
    usual = read_server_logs([write_log(tmp_path / "usual.log", draw(3, 2000), tier_map)], 3)
    _, calm = recalibrate(usual, tier_map, PRICE, BUDGET)
    assert calm["drift"] < 0.1
    # Between always base and always top lie 32 % of HALF, so 5 % would be easily met. A request
    # costs HALF give or take 13 %: one standard error of 2,000, and of 1,500 before, is 0.4 %.
    assert calm["budget"]["before"] == pytest.approx(HALF, rel=0.02)

    shifted = draw(4, 3000, hopeless=0.05, hard=3.0)
    log = read_server_logs([write_log(tmp_path / "a.log", shifted, tier_map, shadows=shadows)], 3)
    found, report = recalibrate(log, tier_map, PRICE, BUDGET)
    assert report["drift"] > 0.25
    assert abs(report["budget"]["before"] / HALF - 1) > 0.05
    assert report["budget"]["after"] == pytest.approx(HALF, rel=0.01)
    assert report["curves"] == ("shadow outcomes" if shadows else "kept")
    fresh = draw(5, 3000, hopeless=0.05, hard=3.0)
    assert spent(found, fresh) == pytest.approx(HALF, rel=0.02)
    assert found.kind == kind
    # What is expected from now on is what the log held.
    again = read_server_logs([write_log(tmp_path / "b.log", fresh, found)], 3)
    assert recalibrate(again, found, PRICE, BUDGET)[1]["drift"] < 0.1
    assert TierMap.from_json(found.to_json()) == found


def test_a_guard_needs_shadow_outcomes_and_one_is_never_dropped_silently(tmp_path: Path) -> None:
    guarded = old_map(guard_alpha=0.3)
    options = CalibrationOptions(Budget(mean_activated=HALF), alpha=0.3)
    few = write_log(tmp_path / "few.log", draw(3, 500), guarded, shadows=MIN_SHADOWS - 1)
    log = read_server_logs([few], 3)
    with pytest.raises(ValueError, match=r"alpha: needs 60 shadow outcomes, the log has 59"):
        recalibrate(log, guarded, PRICE, options)
    floor = CalibrationOptions(Budget(min_quality=0.9))
    with pytest.raises(ValueError, match="min_quality: needs 60 shadow outcomes"):
        recalibrate(log, guarded, PRICE, floor)
    found, report = recalibrate(log, guarded, PRICE, BUDGET)
    assert report["guard_dropped"] and found.guard is None
    many = write_log(tmp_path / "many.log", draw(3, 1500), guarded, shadows=1500)
    found, report = recalibrate(read_server_logs([many], 3), guarded, PRICE, options)
    assert not report["guard_dropped"] and found.guard["bound"] <= 0.3


def test_costs_of_a_log() -> None:
    log = ServerLog(
        difficulty=np.full(60, 0.5), tier=np.repeat([0, 1], 30), prompt_tokens=np.full(60, 10),
        completion_tokens=np.tile([1, 5], 30), ms=np.repeat([2.0, 3.0], 30),
        shadow_difficulty=np.empty(0), agreement=np.empty((0, 3)), nll=np.empty((0, 3)),
        num_unscored=0, num_other=0,
    )  # fmt: skip
    assert set(log.tokens) == {10, 14}
    costs = logged_costs(log, PRICE, "activated_params")
    np.testing.assert_allclose(costs.mean(axis=0), ACTIVATED)
    np.testing.assert_allclose(costs[1] / costs[0], 1.4)
    by_base = logged_costs(log, PRICE, "activated_params", "base")
    np.testing.assert_allclose(by_base[:, 0], costs[:, 0])
    total = 9 * ACTIVATED[0] + 5 * ACTIVATED[2]
    assert by_base[1, 2] == pytest.approx(total / 12)
    flops = logged_costs(log, PRICE, "flops")
    plain = 14 * PRICE.tiers[0].flops_per_token
    assert flops[1, 0] == plain + PRICE.head_flops_per_request
    with pytest.raises(ValueError, match=r"milliseconds need 30 logged requests .* top has 0"):
        logged_costs(log, PRICE, "ms")
