"""The report: its schema, its three files, several seeds joined, hostile text."""

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from test_routing import COSTS, NAMES, fitted, synthetic

from dvpa.evaluate.figure import DARK, LIGHT, format_params, frontier_png
from dvpa.evaluate.report import aggregate_reports, build_report, finite, write_report
from dvpa.tiers.calibrate import expected_calibration_error
from dvpa.tiers.tier_map import TierMap

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def single(seed: int) -> dict[str, Any]:
    fit, calibrate, test = (synthetic(10 * seed + at) for at in range(3))
    telemetry = {"tier_name": "base", "difficulty": 0.25, "success_by_tier": [0.5, 0.75, 1.0]}
    return build_report(
        fit,
        calibrate,
        test,
        fitted(fit, calibrate),
        seed=seed,
        ms={"whole": [1.0, 2.0, 4.0], "routed": [1.5, 2.5, 3.5], "adaptive": [1.75, 2.75, 3.75]},
        samples=[{"question": HOSTILE, "text": "7", "expected": "8", "telemetry": telemetry}],
        wall_seconds=12.5,
        num_resamples=200,
    )


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return [single(seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(reports: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(reports[0], out)
    return out


def check_schema(report: dict[str, Any], num_seeds: int) -> None:
    """design.md section 6, "Demo report"."""
    assert [tier["name"] for tier in report["tiers"]] == list(NAMES)
    assert [tier["activated_params"] for tier in report["tiers"]] == list(COSTS)
    for tier in report["tiers"]:
        assert 0 <= tier["quality"] <= 1
        assert len(tier["quality_by_level"]) == len(report["levels"]) == 3
    expected = {"adaptive", "random", "length", "oracle", *(f"always_{name}" for name in NAMES)}
    assert expected <= set(report["routers"])
    for row in report["routers"].values():
        assert 0 <= row["quality"] <= 1 and row["mean_activated_params"] > 0
        low, high = row["ci95"]
        assert low <= row["quality"] <= high
    assert 0 < report["apgr"] <= 1.5
    assert len(report["ece_by_tier"]) == len(NAMES)
    assert len(report["seeds"]) == num_seeds
    assert report["wall_seconds"] == pytest.approx(12.5 * num_seeds)
    assert {"python", "torch", "transformers"} <= set(report["environment"])


def test_report_json_has_the_schema(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    check_schema(report, num_seeds=1)
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "frontier.png",
        "report.html",
        "report.json",
    ]


def test_numbers_agree_with_the_tables(reports: list[dict[str, Any]]) -> None:
    report, test = reports[0], synthetic(12)
    tier_map = fitted(synthetic(10), synthetic(11))
    for tier in range(3):
        by_level = [test.quality[test.level == level, tier].mean() for level in range(3)]
        assert report["tiers"][tier]["quality_by_level"] == pytest.approx(by_level)
        success = tier_map.success(test.difficulty)[:, tier]
        assert report["ece_by_tier"][tier] == pytest.approx(
            expected_calibration_error(success, test.quality[:, tier])
        )
    adaptive = report["routers"]["adaptive"]["quality"]
    assert report["quality_kept"] == pytest.approx(adaptive / report["tiers"][-1]["quality"])
    assert report["gap_at_oracle"] == pytest.approx(
        report["routers"]["oracle"]["quality"] - adaptive
    )


def test_a_report_without_difficulties_is_honest() -> None:
    fit, calibrate, test = (synthetic(seed, 200) for seed in (1, 2, 3))
    object.__setattr__(test, "difficulty", np.full(200, np.nan))
    tier_map = TierMap.untrained(NAMES, COSTS)
    report = finite(build_report(fit, calibrate, test, tier_map, seed=0, num_resamples=64))
    assert report["ece_by_tier"] == [None] * 3
    assert report["difficulty"]["auroc_by_tier"] == [None] * 3
    assert report["routers"]["adaptive"]["quality"] == report["tiers"][-1]["quality"]
    assert "adaptive" not in report["frontier"]


def test_seeds_are_averaged_with_intervals_over_seeds(reports: list[dict[str, Any]]) -> None:
    joined = aggregate_reports(reports)
    check_schema(joined, num_seeds=3)
    assert joined["seeds"] == [1, 2, 3]
    values = [report["routers"]["adaptive"]["quality"] for report in reports]
    row = joined["routers"]["adaptive"]
    assert row["quality"] == pytest.approx(np.mean(values)) and row["quality_per_seed"] == values
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert row["ci95"] == pytest.approx([interval.low, interval.high])
    errors = [report["routers"]["adaptive"]["standard_error"] for report in reports]
    half = 1.959964 * np.sqrt(np.sum(np.square(errors))) / 3
    assert row["ci95_requests"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    pair = joined["routers"]["random"]["adaptive_minus"]
    singles = [report["routers"]["random"]["adaptive_minus"]["difference"] for report in reports]
    assert pair["difference"] == pytest.approx(np.mean(singles))
    assert pair["difference_per_seed"] == singles
    assert joined["num_requests"] == reports[0]["num_requests"]
    holed = [{**reports[0], "cpt": {"50": float("nan")}}, {**reports[1], "cpt": {"50": 0.25}}]
    assert aggregate_reports(holed)["cpt"] == {"50": None}  # not the mean of the lucky seed
    assert joined["apgr"] == pytest.approx(np.mean([report["apgr"] for report in reports]))
    assert joined["tiers"][1]["quality_by_level"] == pytest.approx(
        np.mean([report["tiers"][1]["quality_by_level"] for report in reports], axis=0)
    )


def test_one_seed_keeps_its_own_intervals(reports: list[dict[str, Any]]) -> None:
    joined = aggregate_reports(reports[:1])
    row = reports[0]["routers"]["length"]
    assert joined["routers"]["length"]["ci95"] == row["ci95"]
    assert joined["routers"]["length"]["adaptive_minus"]["ci95"] == row["adaptive_minus"]["ci95"]
    assert joined["tiers"] == reports[0]["tiers"]


def test_reports_that_do_not_match_are_refused(reports: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="at least one report"):
        aggregate_reports([])
    other = copy.deepcopy(reports[1])
    del other["routers"]["length"]
    with pytest.raises(ValueError, match="same routers"):
        aggregate_reports([reports[0], other])


class Page(HTMLParser):
    """Collects tags, link-like attributes and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escapes_text(folder: Path) -> None:
    source = (folder / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert "script" not in page.tags and "link" not in page.tags
    assert HOSTILE in page.text
    assert len(page.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    embedded = base64.b64decode(page.links[1].partition(",")[2])
    assert embedded == (folder / "frontier.png").read_bytes()
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source
    assert not re.search(r"https?://|@import|url\(", source)
    for expected in ("always middle", "oracle at budget", "level 2", "partial Spearman", "ECE"):
        assert expected in page.text
    # Every opened block is closed: tables, sections and lists are balanced.
    for tag in ("table", "section", "dl", "details", "tr", "div"):
        assert source.count(f"</{tag}>") == page.tags.count(tag), tag


def test_figures_are_pngs_in_two_themes(reports: list[dict[str, Any]]) -> None:
    light, dark = frontier_png(reports[0], LIGHT), frontier_png(reports[0], DARK)
    assert light.startswith(b"\x89PNG\r\n") and dark.startswith(b"\x89PNG\r\n") and light != dark
    bare = {key: reports[0][key] for key in ("tiers", "routers")}
    assert frontier_png(bare).startswith(b"\x89PNG")


def test_rows_of_other_runs_are_shown(reports: list[dict[str, Any]], tmp_path: Path) -> None:
    report = copy.deepcopy(reports[0])
    row = {"quality": 0.5, "mean_activated_params": 100.0, "ci95": [0.4, 0.6]}
    report["routers"] |= {"specialist_base": row, "fixed_base": row}
    paths = write_report(report, tmp_path / "new" / "folder")
    text = paths["report.html"].read_text()
    assert "specialist base" in text and "not trained to be elastic" in text
    assert paths["frontier.png"].read_bytes() != frontier_png(reports[0])


def test_undefined_numbers_become_null_and_missing_keys_are_named(
    reports: list[dict[str, Any]], tmp_path: Path
) -> None:
    report = copy.deepcopy(reports[0])
    report["apgr"] = float("nan")
    report["ece_by_tier"] = np.array([0.1, np.inf, 0.2])
    write_report(report, tmp_path)
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded["apgr"] is None and loaded["ece_by_tier"] == [0.1, None, 0.2]
    del report["apgr"]
    with pytest.raises(ValueError, match="missing: apgr"):
        write_report(report, tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (181_234, "181k"),
        (999_700, "1M"),
        (1.24e6, "1.24M"),
        (31.94e9, "31.9B"),
    ],
)
def test_parameters_are_written_short(value: float, text: str) -> None:
    assert format_params(value) == text
