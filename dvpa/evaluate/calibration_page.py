"""The section of report.html that only `dvpa calibrate` fills: budget, guard, head."""

from collections.abc import Mapping
from html import escape
from typing import Any

from dvpa.evaluate.figure import format_params

_UNITS = {"flops": "FLOPs per request", "ms": "ms per request"}


def calibration_section(report: Mapping[str, Any]) -> str:
    """Empty for a report without a calibration."""
    section = report.get("calibration")
    if section is None:
        return ""
    rows = [*_budget(section["budget"]), *_stay_low(section["stay_low"]), *_head(section["head"])]
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td>"
        f"<td class=quiet>{escape(note)}</td></tr>"
        for name, value, note in rows
    )
    return (
        f"<section><h2>Budget and guard</h2><div class=scroll><table class=notes><tbody>{body}"
        "</tbody></table></div></section>"
    )


def _budget(budget: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    unit = budget["unit"]
    ((name, value),) = budget["stated"].items()
    shares = ("fraction", "min_quality")
    stated = f"{value:.1%}" if name in shares else _amount(value, unit)
    rows = [(name.replace("_", " "), stated, "the budget as stated")]
    if budget.get("limit") is not None:
        rows.append(("limit", _amount(budget["limit"], unit), "what that allows, as a mean"))
    rows.append(
        ("calibrate split", _amount(budget["calibrate"], unit), "what the map spends there")
    )
    change = budget.get("deviation")
    note = "requests that the fit has not seen"
    spent = _amount(budget["test"], unit)
    rows.append(("test split", spent if change is None else f"{spent} ({change:+.1%})", note))
    if "quality_kept" in budget:
        kept = budget["quality_kept"]
        shown = "undefined" if kept is None else f"{kept:.1%}"
        rows.append(("quality kept", shown, "of the top tier's, on the test split"))
    return rows


def _stay_low(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    guard, test = found["guard"], found["test"]
    rows = []
    if guard is not None:
        promise = f"alpha {guard['alpha']:g}, delta {guard['delta']:g}"
        note = f"{promise}: {guard['failures']} of {guard['kept']:,} at the loosest cut that holds"
        rows.append(("guard, bound", f"{guard['bound']:.1%}", note))
    elif (calibrate := found["calibrate"]) is not None:
        note = f"no guard; {calibrate['failures']} of {calibrate['kept']:,} on the calibrate split"
        rows.append((f"bound at {1 - calibrate['delta']:.0%}", f"{calibrate['bound']:.1%}", note))
    note = (
        f"{test['failures']} of {test['kept']:,} requests kept below the top tier lose against it"
    )
    rows.append(("lost by staying low", f"{test['rate']:.1%}", note))
    return rows


def _head(head: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    raw, calibrated = (
        "undefined" if head[key] is None else f"{head[key]:.3f}"
        for key in ("ece_base_raw", "ece_base")
    )
    note = "of P(base suffices): the head's own, then calibrated"
    return [("calibration error", f"{raw} -> {calibrated}", note)]


def _amount(value: float, unit: str) -> str:
    if unit == "activated_params":
        return f"{format_params(value)} activated"
    return f"{value:.4g} {_UNITS[unit]}"
