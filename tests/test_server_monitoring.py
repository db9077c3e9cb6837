"""The Grafana dashboard and the alerts: whole, and they ask for what there is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_events import Series, finished, rendered, telemetry

from dvpa.config import load_yaml
from dvpa.engine.request import FINISH_REASONS
from dvpa.server.metrics import REJECTIONS
from dvpa.tiers.record import DECIDED_BY

SERVE = Path(__file__).resolve().parent.parent / "configs" / "serve"


def found_under(node: Any, key: str) -> Iterator[Any]:
    """Values of `key` anywhere in a JSON-like tree."""
    if isinstance(node, dict):
        for name, child in node.items():
            if name == key:
                yield child
            yield from found_under(child, key)
    elif isinstance(node, list):
        for child in node:
            yield from found_under(child, key)


DASHBOARD = json.loads((SERVE / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = load_yaml(SERVE / "alerts.yaml")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [*found_under(DASHBOARD["panels"], "expr"), *found_under(ALERTS, "expr")]
METRIC = re.compile(r"\b(dvpa_\w+)(?:\{([^}]*)\})?")
OF_PROMETHEUS = {"instance", "job"}  # labels that every scraped series gets


@pytest.fixture(scope="module")
def live() -> Series:
    return rendered(telemetry(finished()))


def problems(query: str, live: Series) -> list[str]:
    """What a query asks for that is not there, or in a way that gives nonsense."""
    found = []
    known: set[str] = set(OF_PROMETHEUS)
    for name, matchers in METRIC.findall(query):
        if name not in live:
            found.append(f"{name}: no such metric")
            continue
        labels = {key for of_one in live[name] for key, _ in of_one} | OF_PROMETHEUS
        known |= labels
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        found += [f"{name}: no label {label}" for label in sorted(asked - labels)]
    for name in re.findall(r"(?<!rate\()(?<!increase\()\b(dvpa_\w+_(?:total|bucket))\b", query):
        found.append(f"{name}: a counter outside rate and increase")
    for group in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", query):
        asked = {label.strip() for label in group.split(",") if label.strip()}
        found += [f"by {label}: no such label" for label in sorted(asked - known)]
    if "histogram_quantile(" in query and not ("_bucket" in query and "by (le" in query):
        found.append("a quantile needs buckets by le")
    if query.count("(") != query.count(")") or query.count("{") != query.count("}"):
        found.append("brackets do not match")
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_there_is(query: str, live: Series) -> None:
    assert METRIC.search(query), "asks for nothing of ours"
    assert problems(query, live) == []


@pytest.mark.parametrize(
    "query",
    [
        "sum(rate(dvpa_requests[5m]))",
        "sum(rate(dvpa_requests_totals[5m]))",
        "dvpa_time_to_first_token_seconds > 1",
        "sum by (level) (rate(dvpa_requests_total[5m]))",
        "sum(rate(dvpa_requests_rejected_total{tier='top'}[5m]))",
        "sum(dvpa_requests_total)",
        "sum(rate(dvpa_requests_total[5m])",
        "histogram_quantile(0.5, rate(dvpa_time_to_first_token_seconds_sum[5m]))",
    ],
)
def test_a_wrong_query_is_caught(query: str, live: Series) -> None:
    assert problems(query, live) != []


def test_label_values_in_alerts_are_ones_there_can_be() -> None:
    allowed = {
        "reason": set(REJECTIONS),
        "finish_reason": set(FINISH_REASONS),
        "decided_by": set(DECIDED_BY),
        "is_fitted": {"true", "false"},
    }
    for query in found_under(ALERTS, "expr"):
        for label, values in re.findall(r"(\w+)=~?'([^']*)'", query):
            assert set(values.split("|")) <= allowed[label], query


def test_alerts_are_whole() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) >= 12
    for rule in RULES:
        assert set(rule) - {"for"} == {"alert", "labels", "annotations", "expr"}, rule["alert"]
        assert re.fullmatch(r"Dvpa[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
        assert re.search(r" [><] ", rule["expr"]), "nothing is compared"


def test_dashboard_panels_fit_and_are_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} overlaps"
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        ids = [target["refId"] for target in panel["targets"]]
        assert len(ids) == len(set(ids)) >= 1
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {
        "datasource",
        "instance",
    }


def test_the_dashboard_shows_what_it_must() -> None:
    shown = " ".join(found_under(DASHBOARD["panels"], "expr"))
    for name in (
        *("requests_total", "decisions", "difficulty_score_bucket", "time_to_first_token_seconds"),
        *("inter_token_latency_seconds", "e2e_request_latency_seconds", "num_requests_waiting"),
        *("kv_cache_usage_perc", "flops_always_top_total", "difficulty_drift_psi"),
        *("requests_rejected_total", "escalations_total"),
    ):
        if name == "decisions":  # why: by what decided the tier a completion ended at
            assert "by (decided_by)" in shown
        else:
            assert f"dvpa_{name}" in shown, name
    for panel in DASHBOARD["panels"]:
        quantiles = re.findall(r"histogram_quantile\(([\d.]+)", json.dumps(panel))
        if "by tier" in panel["title"] and quantiles:
            assert quantiles == ["0.5", "0.95", "0.99"]
