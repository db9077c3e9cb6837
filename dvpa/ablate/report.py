"""results.json, report.html and the figures of a study."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from dvpa.ablate.figures import frontier_png
from dvpa.ablate.panels import calibration_png, confusion_png, load_png, risk_png, surface_png
from dvpa.evaluate.figure import DARK, LIGHT, Theme, format_params
from dvpa.evaluate.markup import document, heat, interval, number, picture, shown, signed, table
from dvpa.evaluate.replacing import write_atomically

_GOALS = {
    "apgr": "APGR, all requests",
    "mixed_kind_apgr": "APGR, within the most mixed task kind",
    "worst_ece": "calibration error, worst tier and seed",
    "worst_budget_deviation": "realised budget against stated, worst seed",
}


_CAPTIONS = {
    "frontier": (
        "Quality against compute",
        "Bands: 95 % t intervals over seeds. Each marker is a configuration at its own budget.",
    ),
    "calibration": (
        "Calibration, reference configuration",
        "Test requests in ten bins by what the map promises of a tier; bars are 95 % intervals of "
        "a bin (Clopper, Pearson).",
    ),
    "risk_coverage": (
        "Risk and coverage, the reference's map",
        "If only the surest requests were answered, each at the tier it got. The grey line orders "
        "them by the outcome. Bands: 95 % t intervals over seeds.",
    ),
    "confusion": (
        "Tiers chosen against the oracle's, maps of the reference's recipe",
        "Rows: the cheapest tier that does best on the request; behind its name, how many requests "
        "that are. Where no tier is right, that is the base tier. All seeds together.",
    ),
    "thresholds": ("How much the thresholds matter, reference recipe", ""),
    "load": (
        "Load of the experts",
        "Above: the busiest expert over the mean, minus 1, of single steps, mean over MoE layers. "
        "Below: rows per expert in the last stage; 1 is an even load. "
        "Bands: 95 % t intervals over seeds.",
    ),
}


def write_study(results: Mapping[str, Any], out: Path) -> dict[str, Path]:
    """Write everything atomically; returns the paths by file name."""
    pictures = study_pictures(results)
    contents: dict[str, str | bytes] = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.html": study_page(results, pictures),
        **{f"{name}.png": light for name, (light, _) in pictures.items()},
    }
    for name, content in contents.items():
        write_atomically(out / name, content)
    return {name: out / name for name in contents}


def study_pictures(results: Mapping[str, Any]) -> dict[str, tuple[bytes, bytes]]:
    """Every figure that the results have something for, light and dark, by name."""
    rows, models = results["configurations"], results["models"]
    reference = rows[0]
    draw: dict[str, Callable[[Theme], bytes]] = {"frontier": partial(frontier_png, results)}
    maps = [r for r in rows if r["recipe"] == reference["recipe"] and "confusion" in r]
    names = [tier["name"] for tier in models[0]["tiers"]]

    def confusion(theme: Theme) -> bytes:
        return confusion_png([(r["map"], r["confusion"]) for r in maps], names, theme)

    if any(curve["tier"] for curve in results.get("calibration", [])):
        draw["calibration"] = partial(calibration_png, results["calibration"])
    if results.get("risk_coverage"):
        draw["risk_coverage"] = partial(risk_png, results["risk_coverage"])
    if maps:
        draw["confusion"] = confusion
    if results.get("surfaces"):
        draw["thresholds"] = partial(surface_png, results["surfaces"])
    if any(model["load"] for model in models):
        draw["load"] = partial(load_png, models)
    return {name: (function(LIGHT), function(DARK)) for name, function in draw.items()}


def study_page(results: Mapping[str, Any], pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The report as one self-contained page."""
    rows = results["configurations"]
    reference = rows[0]
    parts = {name: _figure(name, both, results) for name, both in pictures.items()}
    sections = [
        _header(results),
        _goals(reference),
        parts.get("frontier", ""),
        _configurations(rows),
        _routers(reference),
        _levels(results),
        parts.get("calibration", ""),
        parts.get("risk_coverage", ""),
        parts.get("confusion", ""),
        parts.get("thresholds", ""),
        parts.get("load", ""),
        _load(results["models"]),
        _models(results),
        _environment(results),
    ]
    return document(str(results["title"]), sections)


def _figure(name: str, both: tuple[bytes, bytes], results: Mapping[str, Any]) -> str:
    title, caption = _CAPTIONS[name]
    if name == "thresholds":
        caption = _thresholds(results["surfaces"])
    return (
        f"<section><h2>{escape(title)}</h2><figure>{picture(*both, title)}"
        f"<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def _thresholds(surfaces: Sequence[Mapping[str, Any]]) -> str:
    """What the surfaces say, in words."""
    cost = 100 * surfaces[0]["cost"]
    text = (
        "Maps of three tiers with both cuts at quantiles of the calibrate split: colour is "
        "quality, lines are mean activated parameters, of the top tier's. Star: the best pair "
        f"among those at no more than the reference's cost ({cost:.1f} %), known only afterwards."
    )
    for surface in surfaces:
        if "best" not in surface or "at_this_cost" not in surface:
            continue
        low, high = surface["at_this_cost"]
        text += (
            f" {surface['tiers'][1]} in the middle: best {surface['best']['quality']:.3f}; pairs "
            f"of cuts at about that cost reach {low:.3f} to {high:.3f}."
        )
    return text


def _header(results: Mapping[str, Any]) -> str:
    seeds = results["seeds"]
    count = f"{len(results['configurations'])} configurations, seeds {', '.join(map(str, seeds))}"
    return (
        f"<header><h1>{escape(str(results['title']))}</h1>"
        f"<p class=note>{escape(count)}. Reference: {escape(results['reference'])}. All numbers "
        "are of test requests that neither a head nor a map has seen.</p></header>"
    )


def _goals(reference: Mapping[str, Any]) -> str:
    if "infeasible" in reference:
        return f"<section><p>{escape(reference['infeasible'])}</p></section>"
    body = []
    for name, goal in reference["goals"].items():
        label = _GOALS.get(name, f"adaptive minus {name.removeprefix('beats_')}, equal cost")
        wanted = "interval above 0"
        if "bound" in goal:
            sign = "at most" if name.startswith("worst") else "at least"
            wanted = f"{sign} {goal['bound']:g}"
        verdict = {True: "yes", False: "no", None: "undefined"}[goal["holds"]]
        tone = {True: "better", False: "worse", None: "quiet"}[goal["holds"]]
        body.append(
            f"<tr><th scope=row>{escape(label)}</th><td>{number(goal['value'])}</td>"
            f"<td class=quiet>{interval(goal.get('ci95'))}</td>"
            f"<td class=quiet>{escape(wanted)}</td><td class={tone}>{verdict}</td></tr>"
        )
    head = ["", "value", "95 % interval", "wanted", "holds"]
    return f"<section><h2>Goals, reference configuration</h2>{table(head, body)}</section>"


def _configurations(rows: list[Mapping[str, Any]]) -> str:
    head = ["configuration", "budget", "quality", "of top", "off by"]
    head += ["APGR", "mixed kind", "ECE, worst", "quality minus reference"]
    body = []
    for row in rows:
        cells = [f"<th scope=row>{escape(row['name'])}</th>"]
        cells.append(f"<td class=quiet>{escape(row['budget'] or 'none')}</td>")
        if "infeasible" in row:
            reason = escape(row["infeasible"])
            cells.append(f"<td colspan=7 class=quiet>{reason}</td>")
        else:
            ece = [tier["mean"] for tier in row["ece_by_tier"]]
            worst = None if None in ece else max(ece)
            minus = row.get("minus_reference")
            deviation = row["budget_deviation"]["mean"]
            off = "&ndash;" if deviation is None else f"{100 * deviation:+.1f}&nbsp;%"
            cells += [
                f"<td>{number(row['quality']['mean'])}</td>",
                f"<td>{100 * row['relative_cost']['mean']:.1f}&nbsp;%</td>",
                f"<td>{off}</td>",
                f"<td>{number(row['apgr']['mean'], 2)}</td>",
                f"<td>{number(row['mixed_kind_apgr']['mean'], 2)}</td>",
                f"<td>{number(worst)}</td>",
                f"<td>{signed(minus['quality']) if minus else ''}</td>",
            ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<section class=dense><h2>Configurations</h2>{table(head, body)}"
        "<p class=note>The last column is paired, request by request and seed by seed, with its "
        "bootstrap interval over both; costs may differ. Of top: mean activated parameters, of the "
        "top tier's; off by: those over the budget, minus 1.</p></section>"
    )


def _routers(reference: Mapping[str, Any]) -> str:
    if "infeasible" in reference:
        return ""
    head = ["router", "quality", "of top's cost", "adaptive minus this", "requests only", "seeds"]
    body = []
    for name, row in reference["routers"].items():
        minus = row.get("adaptive_minus")
        cost = row.get("relative_cost", {}).get("mean")
        share = "&ndash;" if cost is None else f"{100 * cost:.1f}&nbsp;%"
        others = ["", ""]
        if minus:
            others = [interval(minus["ci95_requests"]), interval(minus["ci95_seeds"])]
        mark = " class=adaptive" if name == "adaptive" else ""
        body.append(
            f"<tr{mark}><th scope=row>{escape(name.replace('_', ' '))}</th>"
            f"<td>{number(row['quality']['mean'])}</td><td>{share}</td>"
            f"<td>{signed(minus) if minus else ''}</td>"
            f"<td class=quiet>{others[0]}</td><td class=quiet>{others[1]}</td></tr>"
        )
    return (
        f"<section><h2>Routers at equal cost, reference configuration</h2>{table(head, body)}"
        "<p class=note>Differences with 95 % intervals: bootstrap over seeds and requests, over "
        "requests alone, and a t interval over the seeds' means.</p></section>"
    )


def _levels(results: Mapping[str, Any]) -> str:
    reference = results["configurations"][0]["recipe"]
    own = [model for model in results["models"] if model["recipe"] == reference]
    names = [tier["name"] for tier in own[0]["tiers"]]
    body = []
    for place, level in enumerate(own[0]["levels"]):
        cells = [
            heat(sum(m["tiers"][t]["quality_by_level"][place] for m in own) / len(own))
            for t in range(len(names))
        ]
        body.append(f"<tr><th scope=row>level {level}</th>{''.join(cells)}</tr>")
    total = [heat(sum(m["tiers"][t]["quality"] for m in own) / len(own)) for t in range(len(names))]
    body.append(f"<tr class=total><th scope=row>all</th>{''.join(total)}</tr>")
    title = f"Accuracy per level and tier, {escape(reference)}"
    return f"<section><h2>{title}</h2>{table(['', *names], body)}</section>"


def _load(models: Sequence[Mapping[str, Any]]) -> str:
    """MaxVio and dead experts by recipe and tier, means over seeds."""
    if not any(model["load"] for model in models):
        return ""
    body = []
    for recipe in dict.fromkeys(model["recipe"] for model in models):
        own = [model["load"] for model in models if model["recipe"] == recipe]
        for name in own[0]:
            rows = [load[name] for load in own if name in load]
            means = [
                sum(row[key] for row in rows) / len(rows)
                for key in ("max_violation", "worst_layer", "dead_experts")
            ]
            body.append(
                f"<tr><th scope=row>{escape(recipe)}, {escape(name)}</th>"
                f"<td>{means[0]:.2f}</td><td>{means[1]:.2f}</td><td>{means[2]:.1f}</td>"
                f"<td>{rows[0]['experts']}</td></tr>"
            )
    head = ["recipe, tier", "MaxVio", "worst layer", "dead experts", "of"]
    return (
        f"<section>{table(head, body)}<p class=note>MaxVio: busiest expert over mean, minus 1; "
        "means over seeds. Experts are counted over all MoE layers.</p></section>"
    )


def _models(results: Mapping[str, Any]) -> str:
    head = ["recipe", "seed", "training FLOPs", "seconds"]
    names = [tier["name"] for tier in results["models"][0]["tiers"]]
    body = []
    for model in results["models"]:
        cells = "".join(f"<td>{number(tier['quality'])}</td>" for tier in model["tiers"])
        body.append(
            f"<tr><th scope=row>{escape(model['recipe'])}</th><td>{model['seed']}</td>"
            f"<td>{model['training_flops']:.3g}</td><td>{model['stage_seconds']:.0f}</td>{cells}</tr>"
        )
    size = format_params(results["models"][0]["total_params"])
    title = f"Models, {size} parameters in all"
    return f"<section><h2>{title}</h2>{table([*head, *names], body)}</section>"


def _environment(results: Mapping[str, Any]) -> str:
    fields = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(shown(value))}</dd></div>"
        for key, value in results["environment"].items()
    )
    return f"<section><h2>Environment</h2><dl class='legend fields'>{fields}</dl></section>"
