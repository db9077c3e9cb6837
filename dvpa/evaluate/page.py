"""report.html: one self-contained page, light and dark, readable on a phone; all text escaped."""

from collections.abc import Mapping
from html import escape
from typing import Any

from dvpa.evaluate.calibration_page import calibration_section
from dvpa.evaluate.figure import format_params
from dvpa.evaluate.markup import document, heat, interval, number, picture, shown, signed, table

# What each row of the router table is; shown under the table.
_EXPLAINED = {
    "always": "one tier for every request, at that tier's cost",
    "random": "a coin between the two neighbouring tiers, at adaptive's cost",
    "length": "lengths at which the base tier fails more go to higher tiers, at its cost",
    "tfidf": "base-tier failure predicted from character n-grams, at adaptive's cost",
    "cascade": "asks the base tier first and again higher up if it was unsure; both calls are paid",
    "adaptive": "the difficulty head and the tier map, as shipped with the checkpoint",
    "dataset_oracle": "knows how each tier does on each kind of task, at adaptive's cost",
    "oracle_at_budget": "the best choice with all outcomes known, at adaptive's cost",
    "oracle": "per request the cheapest tier that does best",
    "fixed": "an ordinary mixture of experts, not trained to be elastic, run at the tier's k",
    "specialist": "a separate model trained for the tier alone",
}


def render_page(report: Mapping[str, Any], light_png: bytes, dark_png: bytes) -> str:
    """The whole page for a report of plain JSON values (None where undefined)."""
    title = str(report.get("title") or "dvpa report")
    sections = [
        _header(report, title),
        _figure(report, light_png, dark_png),
        _routers(report),
        calibration_section(report),
        _levels(report),
        _difficulty(report),
        _kinds(report),
        _samples(report),
        _environment(report),
    ]
    return document(title, sections)


def _header(report: Mapping[str, Any], title: str) -> str:
    adaptive = report["routers"].get("adaptive")
    top = report["tiers"][-1]
    seeds = report["seeds"]
    counts = report.get("num_requests") or {}
    runs = f"{len(seeds)} seeds, means over them" if len(seeds) > 1 else "one seed"
    tested = f", {counts['test']:,} test requests" if counts.get("test") else ""
    tested += " each" if tested and len(seeds) > 1 else ""
    lead = ""
    facts: list[tuple[str, str]] = []
    if adaptive is not None and top["quality"]:
        kept = adaptive["quality"] / top["quality"]
        cost = adaptive["mean_activated_params"] / top["activated_params"]
        lead = (
            f"<p class=lead>Adaptive routing keeps <b>{100 * kept:.1f} %</b> "
            "of the top tier's quality with "
            f"<b>{100 * cost:.0f} %</b> of its activated parameters.</p>"
        )
        facts = [
            ("quality, adaptive", number(adaptive["quality"])),
            (f"quality, always {top['name']}", number(top["quality"])),
            ("activated, adaptive", format_params(adaptive["mean_activated_params"])),
            (f"activated, {top['name']}", format_params(top["activated_params"])),
            (
                f"APGR (random mix: {number(report.get('random_apgr', 0.5), 2)})",
                number(report["apgr"], 2),
            ),
        ]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return (
        f"<header><h1>{escape(title)}</h1>{lead}<p class=note>{escape(runs + tested)}</p>"
        f"<dl class=facts>{cells}</dl></header>"
    )


def _figure(report: Mapping[str, Any], light_png: bytes, dark_png: bytes) -> str:
    described = "; ".join(
        f"{tier['name']} {number(tier['quality'])} at {format_params(tier['activated_params'])}"
        for tier in report["tiers"]
    )
    bars = "t intervals over seeds" if len(report["seeds"]) > 1 else "bootstrap over requests"
    return (
        "<section><h2>Quality against compute</h2><figure>"
        + picture(light_png, dark_png, f"Quality-compute frontier. Always: {described}.")
        + f"<figcaption>Bars: 95 % {bars}. "
        "Curves are realised on the test requests, with budgets set on "
        "the fit and calibrate splits.</figcaption></figure></section>"
    )


def _routers(report: Mapping[str, Any]) -> str:
    rows = report["routers"]
    timed = any("ms_per_request" in row for row in rows.values())
    head = ["router", "quality", "95 % interval", "activated", "of top", "adaptive minus this"]
    body = []
    for name, row in rows.items():
        difference = row.get("adaptive_minus") or {}
        share = row.get("relative_cost")
        if share is None:
            share = row["mean_activated_params"] / report["tiers"][-1]["activated_params"]
        cells = [
            f"<th scope=row>{escape(_label(name))}</th>",
            f"<td>{number(row['quality'])}</td>",
            f"<td class=quiet>{interval(row.get('ci95'))}</td>",
            f"<td>{format_params(row['mean_activated_params'])}</td>",
            f"<td>{100 * share:.0f}&nbsp;%</td>",
            f"<td>{signed(difference)}</td>",
        ]
        if timed:
            cells.append(f"<td>{number(row.get('ms_per_request'), 1)}</td>")
        mark = " class=adaptive" if name == "adaptive" else ""
        body.append(f"<tr{mark}>{''.join(cells)}</tr>")
    if timed:
        head.append("ms per request")
    kinds = dict.fromkeys(_explained_key(name) for name in rows)
    notes = "".join(
        f"<div><dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_EXPLAINED[key])}</dd></div>"
        for key in kinds
        if key in _EXPLAINED
    )
    return (
        f"<section><h2>Routers at equal cost</h2>{table(head, body)}"
        f"<dl class=legend>{notes}</dl></section>"
    )


def _levels(report: Mapping[str, Any]) -> str:
    tiers = report["tiers"]
    levels = report.get("levels") or list(range(len(tiers[0]["quality_by_level"])))
    counts = (report.get("num_requests") or {}).get("test_by_level")
    body = []
    for index, level in enumerate(levels):
        cells = [f"<th scope=row>level {escape(str(level))}</th>"]
        if counts:
            cells.append(f"<td class=quiet>{counts[index]:,.0f}</td>")
        cells += [heat(tier["quality_by_level"][index]) for tier in tiers]
        body.append(f"<tr>{''.join(cells)}</tr>")
    total = ["<th scope=row>all</th>"]
    if counts:
        total.append(f"<td class=quiet>{sum(counts):,.0f}</td>")
    total += [heat(tier["quality"]) for tier in tiers]
    body.append(f"<tr class=total>{''.join(total)}</tr>")
    price = ["<th scope=row>activated</th>", *(["<td></td>"] if counts else [])]
    price += [f"<td class=quiet>{format_params(tier['activated_params'])}</td>" for tier in tiers]
    body.append(f"<tr>{''.join(price)}</tr>")
    head = ["", *(["requests"] if counts else []), *(str(tier["name"]) for tier in tiers)]
    return f"<section><h2>Accuracy per level and tier</h2>{table(head, body)}</section>"


def _difficulty(report: Mapping[str, Any]) -> str:
    names = [str(tier["name"]) for tier in report["tiers"]]
    metrics = report.get("difficulty") or {}
    lines = [
        ("AUROC of failing, difficulty", metrics.get("auroc_by_tier"), 3),
        ("AUROC of failing, prompt length", metrics.get("length_auroc_by_tier"), 3),
        ("AUROC of failing, TF-IDF", metrics.get("tfidf_auroc_by_tier"), 3),
        ("Spearman with quality lost", metrics.get("spearman_by_tier"), 3),
        ("partial Spearman given log length", metrics.get("partial_spearman_by_tier"), 3),
        ("ECE of P(success), 15 equal-mass bins", report["ece_by_tier"], 4),
        ("Brier score of P(success)", report.get("brier_by_tier"), 4),
    ]
    body = [
        f"<tr><th scope=row>{escape(label)}</th>"
        + "".join(f"<td>{number(value, digits)}</td>" for value in values)
        + "</tr>"
        for label, values, digits in lines
        if values is not None
    ]
    return (
        f"<section><h2>Difficulty and calibration</h2>{table(['', *names], body)}"
        "<p class=note>Per tier, on the test requests. AUROC 0.5 is a coin.</p></section>"
    )


def _kinds(report: Mapping[str, Any]) -> str:
    kinds = (report.get("difficulty") or {}).get("by_kind") or []
    kinds = [kind for kind in kinds if isinstance(kind, Mapping)]
    if len(kinds) < 2:
        return ""
    names = [str(tier["name"]) for tier in report["tiers"]]
    head = ["kind", "requests", *names, "AUROC, difficulty", "AUROC, length"]
    body = []
    for kind in kinds:
        cells = [f"<th scope=row>{escape(str(kind['kind']))}</th>"]
        cells.append(f"<td class=quiet>{kind['num_requests']:,.0f}</td>")
        cells += [heat(value) for value in kind["quality_by_tier"]]
        cells += [f"<td>{number(kind[key])}</td>" for key in ("auroc_base", "auroc_base_length")]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<section><h2>Within each kind of task</h2>{table(head, body)}"
        "<p class=note>AUROC of failing at the base "
        "tier, among requests of one kind: recognising the kind earns nothing here.</p></section>"
    )


def _samples(report: Mapping[str, Any]) -> str:
    blocks = []
    for sample in report.get("samples") or []:
        telemetry = sample.get("telemetry") or {}
        expected, text = sample.get("expected"), str(sample.get("text", ""))
        verdict = ""
        if expected is not None:
            right = sample.get("correct", text.strip() == str(expected).strip())
            verdict = "right" if right else f"expected {expected}"
        tier = telemetry.get("tier_name", "")
        summary = (
            f"<code>{escape(str(sample.get('question', '')))}</code> <span>&rarr;</span> "
            f"<code>{escape(text)}</code> <span class=quiet>{escape(verdict)}</span>"
            f"<span class=tag>{escape(str(tier))}</span>"
        )
        fields = "".join(
            f"<div><dt>{escape(str(key))}</dt><dd>{escape(shown(value))}</dd></div>"
            for key, value in telemetry.items()
        )
        blocks.append(
            f"<details><summary>{summary}</summary>"
            f"<dl class='legend fields'>{fields}</dl></details>"
        )
    if not blocks:
        return ""
    return f"<section><h2>Sample requests</h2>{''.join(blocks)}</section>"


def _environment(report: Mapping[str, Any]) -> str:
    items = {"seeds": ", ".join(map(str, report["seeds"]))}
    if report.get("wall_seconds") is not None:
        items["wall time"] = f"{report['wall_seconds']:,.0f} s"
    items |= {str(key): shown(value) for key, value in report["environment"].items()}
    fields = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in items.items()
    )
    return f"<section><h2>Environment</h2><dl class='legend fields'>{fields}</dl></section>"


def _explained_key(name: str) -> str:
    prefix = name.split("_")[0]
    return prefix if prefix in ("always", "fixed", "specialist") else name


def _label(name: str) -> str:
    return name.replace("_", " ")
